"""Which backend `auto` prefers, as measured."""

CPU = "AVX-512-BF16, 2 cores"
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("cpp", "chunked"),
            "because": f"one pass, a quarter of a byte for each maximum ({CPU})",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "one pass, a quarter of a byte for each maximum; not measured on a GPU "
            "(unverified)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
