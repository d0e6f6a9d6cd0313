"""Which backend `auto` prefers, as measured."""

CPU = "AVX-512-BF16, CPU time of one thread"
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("cpp", "chunked"),
            "because": "with gradients 2.1 to 3.3 times as fast as chunked, 15 times as conv3d at "
            f"3x7x7, 4 to 9 at 3x3x3; in float64 more than 30 times ({CPU})",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "one pass over x, made for this; not measured on a GPU (unverified)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
