"""The implementations that are compared. Each is a function of (query, key, value, scale) per kind,
and says what it serves.

`naive` is the materialising definition, plain autograd (backend `reference`); `two_bmm` is
dot_product by two matrix products in the cheaper order; `tiled` is concat as published blocks write
it, a convolution of all pairs' channels; `sdpa_*` are PyTorch's `scaled_dot_product_attention` with
one backend forced; `chunked`, `cpp` and `auto` are ours, `cpp_avx2` is `cpp` held to AVX2.

Query and key of concat are one score for each position: (B, N, 1) and (B, M, 1).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nlkernels

from . import checks
from .peak import forced_isa, on_isa
from .registry import Case

Function = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_TRIGGERED = re.compile(r"\(Triggered internally at [^)]*\)")

SERVED = ""
"""The reason returned for a case that a provider serves."""


@dataclass(frozen=True)
class Provider:
    """An implementation under measurement.

    Attributes:
        name: How it is called on the command line and in results.
        function: kind -> function of (query (B, N, D), key (B, M, D), value (B, M, V), scale),
            returning (B, N, V).
        reason: (case, dtype, device) -> "" if it serves the case, else why not.
        optional: What it raises means that it does not serve the case, not that it failed.
        passes: The passes it is measured in.
        ours: It is this package's, not one to compare with.
        isa: Instruction set that the C++ kernels are held to; "" for the CPU's best.
    """

    name: str
    function: Callable[[str], Function]
    reason: Callable[[Case, torch.dtype, torch.device], str]
    optional: bool = False
    passes: tuple[str, ...] = ("forward", "forward_backward")
    ours: bool = False
    isa: str = ""

    def step(
        self, case: Case, operands: tuple[Tensor, ...], passes: str
    ) -> Callable[[], dict[str, Tensor]]:
        """The call that is timed and judged, as `benchmarks.checks.step` makes it."""
        return on_isa(self.isa, checks.step(self.function(case.kind), case, operands, passes))


def _two_bmm(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    state = torch.bmm(key.transpose(1, 2), value) * (scale / key.shape[1])
    return torch.bmm(query, state)


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, backend: SDPBackend
) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            query[:, None], key[:, None], value[:, None], scale=scale
        )[:, 0]


def _tiled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # Of V channels, as many as the published blocks' projections have, one holds the score.
    (batch, n, _), (_, m, v) = query.shape, value.shape
    rows, columns = (F.pad(t, (0, v - 1)).transpose(1, 2) for t in (query, key))
    pairs = torch.cat(
        [
            rows[:, :, :, None].expand(batch, v, n, m),
            columns[:, :, None].expand(batch, v, n, m),
        ],
        dim=1,
    )
    scores = F.conv2d(pairs, pairs.new_ones(1, 2 * v, 1, 1)).squeeze(1)
    return torch.bmm(F.relu(scores) / m, value)


def _tiled_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    if case.kind != "concat":
        return "is a form of concat"
    # All pairs' channels and, in the backward, their gradient; the third is slack.
    return _fits(3 * 2 * case.v * case.batch * case.n * case.m * dtype.itemsize, "B*2V*N*M", device)


def _nonlocal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    kind: str,
    backend: str,
    workspace_mib: float | None = None,
) -> Tensor:
    if kind == "concat":
        return nlkernels.nonlocal_concat(query[..., 0], key[..., 0], value, backend=backend)
    options = {"backend": backend, "workspace_mib": workspace_mib}
    return nlkernels.nonlocal_attention(query, key, value, kind=kind, scale=scale, **options)


def available_mib(device: torch.device) -> float:
    """Memory that is free on a device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**10
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def materialised_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """Why a device cannot hold the scores of a case and their gradients."""
    # Scores, weights and the gradients of both live together in the backward; the fifth is slack.
    return _fits(5 * case.batch * case.n * case.m * dtype.itemsize, "B*N*M", device)


def _fits(needed: int, what: str, device: torch.device) -> str:
    free = available_mib(device)
    if needed <= free * 2**20:
        return SERVED
    return f"materialises {what}: needs about {needed / 2**20:.0f} MiB, {free:.0f} MiB are free"


@cache
def _sdpa_reason(
    backend: SDPBackend, d: int, v: int, dtype: torch.dtype, device: torch.device
) -> str:
    query, key, value = (
        torch.randn(1, rows, width, dtype=dtype, device=device, requires_grad=True)
        for rows, width in ((64, d), (32, d), (32, v))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _sdpa(query, key, value, d**-0.5, backend=backend).sum().backward()
        except RuntimeError as error:
            said = " ".join([*(str(warning.message) for warning in caught), str(error)])
            reason = " ".join(_TRIGGERED.sub("", said).split())
            return f"torch refuses {backend.name} here: {reason}"[:400]
    return SERVED


def _sdpa_provider(name: str, backend: SDPBackend) -> Provider:
    def reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
        if case.kind not in ("softmax", "gaussian"):
            return "scaled_dot_product_attention has no form without softmax"
        refusal = _sdpa_reason(backend, case.d, case.v, dtype, device)
        if refusal or backend is not SDPBackend.MATH:
            return refusal
        return materialised_reason(case, torch.float32, device)

    return Provider(name, lambda kind: partial(_sdpa, backend=backend), reason)


def own_provider(
    name: str, backend: str, workspace_mib: float | None = None, isa: str = ""
) -> Provider:
    """A backend of this package under a name."""

    def reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
        if backend == "reference":
            return materialised_reason(case, dtype, device)
        if workspace_mib is not None and case.kind == "concat":
            return "concat has no workspace"
        try:
            with forced_isa(isa):
                _explain(case, dtype, device, backend)
        except NotImplementedError as error:
            return str(error)
        return SERVED

    def function(kind: str) -> Function:
        return partial(_nonlocal, kind=kind, backend=backend, workspace_mib=workspace_mib)

    return Provider(name, function, reason, ours=backend != "reference", isa=isa)


def _explain(case: Case, dtype: torch.dtype, device: torch.device, backend: str):
    query, key, value = (
        torch.empty(case.batch, rows, width, dtype=dtype, device=device)
        for rows, width in ((case.n, case.d), (case.m, case.d), (case.m, case.v))
    )
    if case.kind == "concat":
        scores = query[..., 0], key[..., 0]
        return nlkernels.explain("nonlocal_concat", *scores, value, backend=backend)
    options = {"kind": case.kind, "scale": case.scale, "backend": backend}
    return nlkernels.explain("nonlocal_attention", query, key, value, **options)


def chosen_backend(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """The backend that `auto` takes for a case."""
    return _explain(case, dtype, device, "auto").backend


def _two_bmm_reason(case: Case, dtype: torch.dtype, device: torch.device) -> str:
    return SERVED if case.kind == "dot_product" else "only dot_product can be reassociated"


PROVIDERS = {
    provider.name: provider
    for provider in (
        own_provider("naive", "reference"),
        Provider("two_bmm", lambda kind: _two_bmm, _two_bmm_reason),
        Provider("tiled", lambda kind: _tiled, _tiled_reason),
        _sdpa_provider("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        _sdpa_provider("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
        _sdpa_provider("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
        _sdpa_provider("sdpa_math", SDPBackend.MATH),
        own_provider("chunked", "chunked"),
        own_provider("cpp", "cpp"),
        own_provider("cpp_avx2", "cpp", isa="avx2"),
        own_provider("auto", "auto"),
    )
}

DEFAULT = tuple(name for name, provider in PROVIDERS.items() if not provider.isa)
"""Providers that are measured where none are named: another instruction set is compiled first."""
