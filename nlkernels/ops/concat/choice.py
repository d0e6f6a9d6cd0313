"""Which backend `auto` prefers."""

TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("cpp", "chunked"),
            "because": "one walk over the sorted scores, without tables of sums; ahead of chunked "
            "and of the definition in float32 and bfloat16 (AVX-512-BF16, CPU time of one thread)",
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
