"""Which backend `auto` prefers, as measured."""

CPU = "measured on AVX-512-BF16 with AMX, 2 threads"
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked",),
            "because": "with gradients 4 to 20 times as fast as conv3d at 3x7x7, 2 to 7 times at "
            f"3x3x3 ({CPU})",
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
