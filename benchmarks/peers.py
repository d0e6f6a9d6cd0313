"""What else there is on a GPU: compiled eager code, FlexAttention, ffpa-attn; and our kernels by
name. `PROVIDERS` of providers.py are the rest.

Peers are asked by calling them: what they raise is the reason why they do not serve a case.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .checks import eager
from .providers import (
    PROVIDERS,
    SERVED,
    Function,
    Provider,
    materialised_reason,
    own_provider,
)
from .registry import Case

FUSED_DEPTH = 256
"""Widest channels at which `triton` without a workspace is the same kernel as with one."""

CAPS = (20, 40, 80, 160)
"""Workspaces in MiB that are compared: what stays in an L2 of 60 MB is the question."""

SWEEP = tuple(f"triton_{cap}mib" for cap in CAPS)


@cache
def _compiled(kind: str) -> Callable[..., Tensor]:
    # The CPU's compiler takes a minute; a dry run is about the path, not about its speed.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(partial(eager, kind=kind), dynamic=False, backend=backend)


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it materialises the scores: only good for a dry run.
    return torch.compile(flex_attention, dynamic=False) if torch.cuda.is_available() else _plain


def _plain(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    import warnings

    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flex_attention(query, key, value, scale=scale)


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return _flex()(query[:, None], key[:, None], value[:, None], scale=scale)[:, 0]


def _softmax_only(case: Case, *_: object) -> str:
    return SERVED if case.kind in ("softmax", "gaussian") else "has no form without softmax"


def _ffpa_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    if importlib.util.find_spec("ffpa_attn") is None:
        return "the package ffpa-attn is not installed; benchmarks/README.md says how to carry it"
    if case.d != case.v or not FUSED_DEPTH < case.d <= 1024:
        return f"its kernels serve D = V from 257 to 1024, not {case.d}/{case.v}"
    if device.type != "cuda":
        return f"its kernels run on GPUs, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "its kernels take float16 and bfloat16"
    return _softmax_only(case)


def _ffpa(query: Tensor, key: Tensor, value: Tensor, scale: float, *, tma: bool) -> Tensor:
    # Else it hands small problems to SDPA, which is measured by its own name.
    os.environ["FFPA_FORCE_NO_SDPA_FALLBACK"] = "1"
    from ffpa_attn import TritonBackend, ffpa_attn_func

    operands = (query[:, None], key[:, None], value[:, None])
    return ffpa_attn_func(*operands, scale=scale, backend=TritonBackend(enable_tma=tma))[:, 0]


def _lean_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    if case.kind == "concat":
        return "concat has no workspace"
    if max(case.d, case.v) <= FUSED_DEPTH:
        return "up to 256 channels the forward has no workspace anyway"
    return own_provider("", "triton").reason(case, dtype, device)


def _peer(name: str, function: Callable[[str], Function], reason: Any) -> Provider:
    return Provider(name, function, reason, optional=True)


CPU_ONLY = ("cpp", "cpp_avx2")

GPU_PROVIDERS = {name: PROVIDERS[name] for name in PROVIDERS if name not in CPU_ONLY} | {
    provider.name: provider
    for provider in (
        own_provider("triton", "triton"),
        own_provider("cuda", "cuda"),
        Provider(
            "triton_lean",
            own_provider("", "triton", workspace_mib=0).function,
            _lean_reason,
            passes=("forward",),
            ours=True,
        ),
        *(own_provider(f"triton_{cap}mib", "triton", cap) for cap in CAPS),
        _peer("compiled", _compiled, materialised_reason),
        _peer("flex", lambda kind: _flex_attention, _softmax_only),
        _peer("ffpa", lambda kind: partial(_ffpa, tma=False), _ffpa_reason),
        _peer("ffpa_tma", lambda kind: partial(_ffpa, tma=True), _ffpa_reason),
    )
}
"""Everything that a GPU run compares."""

QUICK = (
    "naive",
    "two_bmm",
    "tiled",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "ffpa",
    "ffpa_tma",
    "chunked",
    "triton",
    "triton_lean",
    "cuda",
    "auto",
)
"""Providers that are ready in a second or two."""

COMPILED = ("compiled", "flex", "auto")
"""Providers that compile for every shape, beside `auto` in the same rounds."""


def forget_compiled() -> None:
    """Drop compiled code: past a few shapes torch would stop compiling and run eagerly."""
    torch._dynamo.reset()
    _compiled.cache_clear()
    _flex.cache_clear()
