"""Which backend `auto` prefers; where it says nothing, `chunked` runs."""

TABLE = {
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "triton"),
            "because": "the library's matrix products in the order that costs fewer FLOPs; "
            "unverified, nothing was measured on a GPU (nlkernels.warmup measures here)",
        },
    ),
}
