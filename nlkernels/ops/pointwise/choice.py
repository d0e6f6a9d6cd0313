"""Which backend `auto` prefers, as measured."""

CPU = "AVX-512-BF16, 2 cores"
WIDE = ("avx512", "avx512_bf16")
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "isas": WIDE,
            "order": ("cpp", "chunked"),
            "because": "bias, residual and float32 sums with the product: level with the library's "
            f"bare product ({CPU})",
        },
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "cpp"),
            "because": "the library's matrix products; not measured with these instructions",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "bias, residual and all sources in one launch, maps and rows as they lie; "
            "not measured on a GPU (unverified)",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "serves every dtype (unverified)",
        },
    ),
}
