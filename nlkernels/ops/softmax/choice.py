"""Which backend `auto` prefers, as measured: for each device, the first row that fits decides.

A row fits by dtype, and where it names them by pass and by the largest N*M. Plain data, so that
torch.compile can trace a choice.
"""

CPU = "measured on AVX-512-BF16, 2 cores"
TABLE = {
    "cpu": (
        {
            "dtypes": ("bfloat16",),
            "pass": "forward",
            "scores_up_to": 2048,
            "order": ("sdpa", "chunked"),
            "because": f"one fused call wins where N*M <= 2048 ({CPU})",
        },
        {
            "dtypes": ("float16",),
            "order": ("chunked",),
            "because": "computed in float32; torch's float16 CPU kernel overflows, loses precision",
        },
        {
            "dtypes": ("bfloat16",),
            "order": ("chunked", "sdpa"),
            "because": f"torch's 16-bit CPU flash kernel runs at float32 speed ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "pass": "backward",
            "order": ("chunked", "sdpa"),
            "because": f"level with torch's flash backward, exact where its lse rounds ({CPU})",
        },
        {
            "dtypes": ("float32",),
            "order": ("sdpa", "chunked"),
            "because": f"torch's float32 CPU flash kernel is level or ahead ({CPU})",
        },
        {
            "dtypes": ("float64",),
            "order": ("chunked", "sdpa"),
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
