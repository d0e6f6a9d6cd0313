"""Which backend `auto` prefers."""

TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked",),
            "because": "linear in N and M; on small problems, about N=784 M=196 and below, the "
            "definition may be faster",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "fewer passes over memory; unverified order, nothing was measured on a GPU",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
