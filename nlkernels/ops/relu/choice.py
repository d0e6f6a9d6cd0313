"""Which backend `auto` prefers, as measured."""

TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("cpp", "chunked"),
            "because": "1.1 to 1.6 times as fast as chunked, with gradients 0.9 to 1.9 times "
            "(measured on AVX-512-BF16, 2 cores)",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "scores never leave the kernel, or once in tiles; unverified order, nothing "
            "was measured on a GPU (nlkernels.warmup measures here)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
