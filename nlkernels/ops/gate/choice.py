"""Which backend `auto` prefers, as measured."""

TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("cpp", "chunked"),
            "because": "reads x once in each pass; ahead of chunked and plain autograd at res3 "
            "and res4 of 8 frames, float32 and bfloat16 (AVX-512-BF16, CPU time of one thread)",
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
