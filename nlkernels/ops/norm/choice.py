"""Which backend `auto` prefers, as measured."""

CPU = "AVX-512-BF16, 2 cores"
WIDE = ("avx512", "avx512_bf16")
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "isas": WIDE,
            "order": ("cpp", "chunked"),
            "because": f"statistics with the product, norm and residual in one pass ({CPU})",
        },
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "cpp"),
            "because": "the library's matrix products and torch's batch norm; not measured with "
            "these instructions",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "statistics with the product, norm and residual in one pass; not measured "
            "on a GPU (unverified)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
