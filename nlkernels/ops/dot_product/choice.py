"""Which backend `auto` prefers, as measured."""

CPU = "measured on AVX-512-BF16, 2 cores"
TABLE = {
    "cpu": (
        {
            "dtypes": ("float16",),
            "isas": ("avx512", "avx512_bf16"),
            "order": ("cpp", "chunked"),
            "because": "computed in float32, without copies of the operands: 0.9 to 2.1 times as "
            f"fast as chunked ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "isas": ("avx512", "avx512_bf16"),
            "pass": "backward",
            "scores_up_to": 2**18,
            "order": ("chunked", "cpp"),
            "because": "the library's products, in the order that forms few scores, take 0.87 of "
            f"the time of the C++ kernels where N*M <= 2**18 ({CPU})",
        },
        {
            "dtypes": ("bfloat16",),
            "isas": ("avx512_bf16",),
            "pass": "forward",
            "depth_from": 257,
            "order": ("chunked", "cpp"),
            "because": "the library's products take 0.94 to 1.0 of the time of the C++ kernels "
            f"where D > 256 ({CPU})",
        },
        {
            "dtypes": ("bfloat16",),
            "isas": ("avx512_bf16",),
            "depth_from": 128,
            "order": ("cpp", "chunked"),
            "because": f"1.01 to 1.1 times as fast as chunked ({CPU})",
        },
        {
            "dtypes": ("float32", "float64"),
            "isas": ("avx512", "avx512_bf16"),
            "depth_from": 128,
            "order": ("cpp", "chunked"),
            "because": f"0.9 to 2.0 times as fast as chunked, less where D < 128 ({CPU})",
        },
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "cpp"),
            "because": "the library's matrix products in the order that costs fewer FLOPs are "
            f"level or ahead ({CPU})",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32", "float64"),
            "order": ("chunked", "triton"),
            "because": "the library's matrix products in the order that costs fewer FLOPs; "
            "unverified, nothing was measured on a GPU (nlkernels.warmup measures here)",
        },
    ),
}
