"""Which backend `auto` prefers, as measured."""

TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked",),
            "because": "with gradients 1.6 to 5 times as fast as plain autograd at res3 and res4 "
            "of 8 frames (AVX-512-BF16, 1 thread)",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "reads x once, made for this; not measured on a GPU (unverified)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
