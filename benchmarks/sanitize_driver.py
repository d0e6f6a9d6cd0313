"""Every kernel at least once, on small odd problems: the program that a sanitizer watches.

`python -m benchmarks.sanitize_driver --device cuda [--part NAME]` prints the kernels it launched
and, last, `DONE`. Operands are drawn on the CPU and results looked at there, so that little else
runs on the GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import nlkernels
from nlkernels import _cuda

from .features import NAMES, step
from .kernel_rows import Recorder, recorded
from .stage import interpret

# Batch, N, M, D, V and workspace; fused with keys shared out among programs, fused with odd
# channels (no descriptors), staged with several tiles, and the O(N) form of wide channels.
SOFTMAX = (
    (1, 33, 700, 40, 24, None),
    (1, 50, 33, 37, 19, None),
    (2, 150, 300, 264, 72, None),
    (1, 77, 45, 264, 72, 0),
)
# As above, for the kernels for Hopper: each of their three forms, in both layouts; 176 keys are
# several tiles and a part of one.
HOPPER = (
    (2, 152, 176, 256, 256, None),
    (1, 152, 176, 512, 512, None),
    (1, 72, 176, 1024, 512, None),
)
# Few keys, where dot_product computes scores; relu runs the problems of softmax.
FEW_KEYS = ((1, 50, 9, 37, 19, None), (2, 150, 60, 264, 72, None), (1, 77, 12, 264, 72, 0))
# Batch, N, M, V: several chunks of a scan, and fewer keys than one.
CONCAT = ((2, 150, 333, 40), (1, 33, 20, 19))
GATE = ((2, 24, 3, 9, 7), (1, 70, 2, 5, 3))
REGION = (2, 24, 3, 9, 7)
TAPS = ((3, 7, 7), (3, 3, 3))
FEW_TAPS = ((1, 3, 3),)
"""For the interpreter, which takes seconds for the 147 taps of the larger kernel."""
# Batch, N, C, P: several tiles and runs of the sums; one tile without descriptors.
POINTWISE = ((2, 152, 72, 136), (1, 33, 19, 37))
# Batch, N, C: several tiles and runs of the sums; one tile.
NORM = ((2, 1300, 264), (1, 33, 37))
# x and window: winners of 2 bits, and of bytes.
POOL = (((2, 21, 3, 9, 7), [1, 2, 2]), ((1, 70, 3, 6, 5), [3, 3, 2]))

# Both layouts and all dtypes, without every pair of them: compilation is most of the time.
FORMS = (
    ("bfloat16", "rows"),
    ("bfloat16", "channels"),
    ("float16", "rows"),
    ("float32", "channels"),
)
OPERATIONS = (
    "softmax",
    "relu",
    "dot_product",
    "concat",
    "region",
    "gate",
    "pointwise",
    "norm",
    "pool",
)
PARTS = tuple(
    f"{op}-{dtype}-{layout}"
    for op in OPERATIONS
    # The kernels of dot_product are those of relu with a line less.
    for dtype, layout in (FORMS if op != "dot_product" else FORMS[2:])
)
# Those of the backend cuda: on GPUs alone, where the module can be had.
CUDA_PARTS = tuple(
    f"{op}-{dtype}-{layout}-cuda"
    for op in ("softmax", "relu", "dot_product", "concat", "region", "gate")
    for dtype, layout in FORMS
)


def run_attention(
    dtype: torch.dtype, layout: str, device: torch.device, backend: str = "triton", *, kind: str
) -> Iterator[Tensor]:
    """Outputs and gradients of every problem."""
    # The interpreter, too, is spared the keys: softmax has shown it all of them.
    few = kind == "dot_product" or (kind == "relu" and device.type == "cpu")
    problems = FEW_KEYS if few else SOFTMAX
    if (kind, backend) == ("softmax", "cuda"):
        problems = (*problems, *HOPPER)
    for number, (batch, n, m, d, v, workspace) in enumerate(problems):
        generator = torch.Generator().manual_seed(number)
        leaves = []
        for rows, width in ((n, d), (m, d), (m, v)):
            tensor = torch.randn(batch, rows, width, generator=generator).to(dtype)
            if layout == "channels":
                tensor = tensor.mT.contiguous().mT
            leaves.append(tensor.to(device).requires_grad_())
        options = {"kind": kind, "backend": backend, "workspace_mib": workspace}
        out = nlkernels.nonlocal_attention(*leaves, **options)
        yield from _both(out, leaves, generator)


def run_concat(
    dtype: torch.dtype, layout: str, device: torch.device, backend: str = "triton"
) -> Iterator[Tensor]:
    """Outputs and gradients of every problem."""
    for number, (batch, n, m, v) in enumerate(CONCAT):
        generator = torch.Generator().manual_seed(number)
        leaves = []
        for size in ((batch, n), (batch, m), (batch, m, v)):
            tensor = torch.randn(size, generator=generator).to(dtype)
            if layout == "channels":
                tensor = tensor.mT.contiguous().mT
            leaves.append(tensor.to(device).requires_grad_())
        yield from _both(nlkernels.nonlocal_concat(*leaves, backend=backend), leaves, generator)


def _both(out: Tensor, leaves: list[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    grad = torch.randn(out.shape, generator=generator).to(out)
    yield out.detach()
    yield from torch.autograd.grad(out, leaves, grad)


def run_gate(
    dtype: torch.dtype, layout: str, device: torch.device, backend: str = "triton"
) -> Iterator[Tensor]:
    """Outputs and gradients of every problem."""
    form = torch.channels_last_3d if layout == "channels" else torch.contiguous_format
    for number, size in enumerate(GATE):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=form)
        weight = torch.randn(size[1], generator=generator).to(dtype)
        leaves = [t.to(device).requires_grad_() for t in (x, weight)]
        out = nlkernels.channel_gate(*leaves, transform=_identity, backend=backend)
        yield from _both(out, leaves, generator)


def _identity(context: Tensor) -> Tensor:
    return context


def run_region(
    dtype: torch.dtype, layout: str, device: torch.device, backend: str = "triton"
) -> Iterator[Tensor]:
    """Outputs and gradients of every problem."""
    form = torch.channels_last_3d if layout == "channels" else torch.contiguous_format
    for number, taps in enumerate(FEW_TAPS if device.type == "cpu" else TAPS):
        generator = torch.Generator().manual_seed(number)
        x, grad = (
            torch.randn(REGION, generator=generator)
            .to(dtype)
            .contiguous(memory_format=form)
            .to(device)
            for _ in range(2)
        )
        weight = torch.randn(REGION[1], *taps, generator=generator).to(dtype).to(device)
        aggregate = partial(nlkernels.region_aggregate, backend=backend)
        results = step(aggregate, (x, weight, grad), "forward_backward")()
        yield from (results[name] for name in NAMES)


def run_pointwise(dtype: torch.dtype, layout: str, device: torch.device) -> Iterator[Tensor]:
    """Products of one source and of three, to rows and to maps, and the sums of products."""
    # Later than `interpret`: operators import parts of Triton.
    from nlkernels.ops.pointwise import op

    for number, (batch, positions, depth, channels) in enumerate(POINTWISE):
        generator = torch.Generator().manual_seed(number)
        tensors = []
        for size in ((batch, positions, depth), (batch, positions, channels), (channels, depth)):
            tensor = torch.randn(size, generator=generator).to(dtype)
            if layout == "channels":
                tensor = tensor.mT.contiguous().mT
            tensors.append(tensor.to(device))
        features, base, weight = tensors
        shift = torch.randn(channels, generator=generator).to(device)
        yield op.product([(features, weight)], shift, base, True, "triton")
        yield op.product([(features, weight)] * 3, None, None, False, "triton")
        yield from op.outer(base, features, "triton")


def run_norm(dtype: torch.dtype, layout: str, device: torch.device) -> Iterator[Tensor]:
    """A product with its statistics, the norm, and gradients at once and in halves."""
    from nlkernels.ops.norm import op  # noqa: F401 - its operators

    operators = torch.ops.nlkernels
    for number, (batch, positions, channels) in enumerate(NORM):
        generator = torch.Generator().manual_seed(number)
        tensors = []
        for size in ((batch, positions, channels), (channels, channels), (2, channels)):
            tensors.append(torch.randn(size, generator=generator).to(dtype).to(device))
        features, weight, (gamma, beta) = tensors
        maps = layout == "channels"
        z, moments = operators.norm_product(features, weight, beta.float(), maps, "triton")
        out = operators.norm_forward(z, moments, gamma, beta, features, 1e-5, "triton")
        sums = operators.norm_sums(out, z, moments, 1e-5, "triton")
        given = out, z, gamma, moments
        yield from (z, moments, out, sums)
        yield from operators.norm_backward(*given, 1e-5, "triton")
        yield operators.norm_gradient(*given, sums / (batch * positions), 1e-5, "triton")


def run_pool(dtype: torch.dtype, layout: str, device: torch.device) -> Iterator[Tensor]:
    """Outputs and gradients of every problem."""
    from nlkernels.ops.pool import op

    form = torch.channels_last_3d if layout == "channels" else torch.contiguous_format
    for number, (size, window) in enumerate(POOL):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(size, generator=generator).to(dtype).contiguous(memory_format=form)
        leaves = [x.to(device).requires_grad_()]
        out = op.pool(*leaves, window, "triton")
        yield from _both(out, leaves, generator)


def parts_of(device: str) -> tuple[str, ...]:
    """All parts that a type of device can run."""
    return (*PARTS, *CUDA_PARTS) if device == "cuda" else PARTS


def run(parts: tuple[str, ...], device: torch.device) -> Recorder:
    """Runs parts; returns what they launched.

    Raises:
        ArithmeticError: A result is not finite.
    """
    runs: dict[str, Callable[..., Iterator[Tensor]]] = {
        **{kind: partial(run_attention, kind=kind) for kind in ("softmax", "relu", "dot_product")},
        "concat": run_concat,
        "region": run_region,
        "gate": run_gate,
        "pointwise": run_pointwise,
        "norm": run_norm,
        "pool": run_pool,
    }
    with recorded() as recorder:
        for part in parts:
            op, dtype, layout, *backend = part.split("-")
            if backend and (missing := _cuda.CUDA.missing()):
                print(f"left out {part}: {missing}", flush=True)
                continue
            for result in runs[op](getattr(torch, dtype), layout, device, *backend):
                if not result.cpu().isfinite().all():
                    raise ArithmeticError(f"{part}: a result {tuple(result.shape)} is not finite")
            print(f"ran {part}", flush=True)
    return recorder


def main(arguments: list[str] | None = None) -> int:
    """Runs one part, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize_driver")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", choices=(*PARTS, *CUDA_PARTS), action="append")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        interpret()
    recorder = run(tuple(options.part or parts_of(options.device)), torch.device(options.device))
    counts = {name: len(launches) for name, launches in recorder.launches.items()}
    print("KERNELS", " ".join(f"{name}={count}" for name, count in sorted(counts.items())))
    print("DONE")
    return 0


if __name__ == "__main__":
    sys.exit(main())
