"""Which backend `auto` prefers; where it says nothing, `chunked` runs."""

TABLE = {
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
