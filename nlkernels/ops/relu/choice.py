"""Which backend `auto` prefers, as measured."""

# Where the C++ kernels were measured to be ahead: wide vectors, and pairs of bfloat16.
BECAUSE = (
    "0.9 to 1.6 times as fast as chunked, in most cases more than 1.1 "
    "(measured on AVX-512-BF16, 2 cores)"
)
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16", "float32", "float64"),
            "isas": ("avx512", "avx512_bf16"),
            "order": ("cpp", "chunked"),
            "because": BECAUSE,
        },
        {
            "dtypes": ("bfloat16",),
            "isas": ("avx512_bf16",),
            "order": ("cpp", "chunked"),
            "because": BECAUSE,
        },
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "cpp"),
            "because": "cpp was not measured with this instruction set (unverified)",
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
