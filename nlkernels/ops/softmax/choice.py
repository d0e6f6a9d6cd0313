"""Which backend `auto` prefers, as measured: for each device, the first row that fits decides.

A row fits by dtype, and where it names them by pass, by the largest N*M, the least D, and the
instruction set that the C++ kernels use. Plain data, so that torch.compile can trace a choice.
"""

CPU = "measured on AVX-512-BF16, 2 cores"
# Where the C++ kernels were measured: wider vectors than others', and pairs of bfloat16.
WIDE, PAIRS = ("avx512", "avx512_bf16"), ("avx512_bf16",)
TABLE = {
    "cpu": (
        {
            "dtypes": ("bfloat16",),
            "isas": PAIRS,
            "order": ("cpp", "chunked", "sdpa"),
            "because": "1.0 to 2.0 times as fast as chunked, 1.4 to 2.7 times as torch's flash "
            f"kernel, which runs at float32 speed ({CPU})",
        },
        {
            "dtypes": ("float16",),
            "isas": WIDE,
            "order": ("cpp", "chunked"),
            "because": "computed in float32, without copies of the operands: 1.0 to 1.9 times as "
            f"fast as chunked; torch's float16 CPU kernel overflows, loses precision ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "isas": WIDE,
            "pass": "backward",
            "order": ("cpp", "chunked", "sdpa"),
            "because": "with the forward 1.0 to 1.7 times as fast as chunked and as torch's flash "
            f"kernel, whose rounded lse shows ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "isas": WIDE,
            "order": ("cpp", "sdpa", "chunked"),
            "because": "1.1 to 1.5 times as fast as torch's flash kernel, 1.0 to 1.5 times as "
            f"chunked ({CPU})",
        },
        {
            "dtypes": ("float64",),
            "isas": WIDE,
            "order": ("cpp", "chunked", "sdpa"),
            "because": f"1.0 to 1.7 times as fast as chunked and torch's flash kernel ({CPU})",
        },
        {
            "dtypes": ("bfloat16",),
            "pass": "forward",
            "scores_up_to": 2048,
            "order": ("sdpa", "chunked", "cpp"),
            "because": f"one fused call wins where N*M <= 2048 ({CPU})",
        },
        {
            "dtypes": ("float16",),
            "order": ("chunked", "cpp"),
            "because": "computed in float32; torch's float16 CPU kernel overflows, loses precision",
        },
        {
            "dtypes": ("bfloat16",),
            "order": ("chunked", "sdpa", "cpp"),
            "because": f"torch's 16-bit CPU flash kernel runs at float32 speed ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "pass": "backward",
            "order": ("chunked", "sdpa", "cpp"),
            "because": f"level with torch's flash backward, exact where its lse rounds ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "order": ("sdpa", "chunked", "cpp"),
            "because": f"torch's float32 CPU flash kernel is level or ahead ({CPU})",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked", "sdpa", "cpp"),
            "because": f"level with torch's flash kernel ({CPU})",
        },
    ),
    "cuda": (
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "deterministic": False,
            "order": ("sdpa", "triton", "chunked"),
            "because": "torch's fused kernels where they serve, then ours; unverified order, "
            "nothing of ours was measured on a GPU (nlkernels.warmup measures here)",
        },
        {
            "dtypes": ("float16", "bfloat16", "float32"),
            "order": ("triton", "chunked"),
            "because": "bitwise repeatable; unverified order, nothing was measured on a GPU",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked",),
            "because": "bitwise repeatable, and serves every dtype (unverified)",
        },
    ),
}
