"""Which plan of the Hopper softmax kernels is fastest: clusters, tile widths, slots of the rings.

    python -m benchmarks.hopper_plans [HEAD ...] [--backward] [--rounds N]      HEAD: 512x256

One line of JSON for each shape, dtype and plan of `cuda_hopper_plan.alternatives`, or for gradients
of `cuda_hopper_backward_plan.alternatives`, beside the other backends that serve the shape: first
whether the result passes the rule and repeats bit for bit, then its time. A wrong plan is not
timed. Each head runs in a process of its own with a limit of time, for a kernel that waits for ever
would hold all that follow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from nlkernels import _cuda, nonlocal_attention
from nlkernels._rule import GRADIENT, OUTPUT, excess
from nlkernels._spec import Problem
from nlkernels.ops.softmax import (
    cuda_hopper,
    cuda_hopper_backward,
    cuda_hopper_backward_plan,
    cuda_hopper_plan,
    reference,
)

from . import timing

HEADS = ("256x256", "512x512", "512x256", "1024x512")
# (B, N, M): res3 and res4 of 4, 8, 16 and 128 frames at 224 pixels, keys pooled in space.
_SHAPES = {
    256: ((8, 3136, 784), (8, 6272, 1568), (8, 12544, 3136), (1, 100352, 25088)),
    512: ((8, 784, 196), (8, 1568, 392), (8, 3136, 784), (1, 25088, 6272)),
}
_PEERS = ("triton", "sdpa")
_CHECKED_ROWS = 300
_LIMIT_S = 120


class _Forward:
    """The forward of operands of one shape."""

    flops = 2

    def __init__(self, sizes: tuple[int, ...], head: tuple[int, int], dtype: torch.dtype) -> None:
        batch, queries, keys = sizes
        shapes = ((queries, head[0]), (keys, head[0]), (keys, head[1]))
        made = [torch.randn(batch, *each, device="cuda").to(dtype) for each in shapes]
        self.operands, self.scale = made, head[0] ** -0.5

    def candidates(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Plans, and other backends."""

        def planned(plan):
            return lambda: cuda_hopper.forward(*self.operands, self.scale, plan)[0]

        def peer(backend):
            return lambda: nonlocal_attention(*self.operands, backend=backend)

        plans = cuda_hopper_plan.alternatives(Problem.of(*self.operands))
        return {str(plan): planned(plan) for plan in plans} | {name: peer(name) for name in _PEERS}

    def fault(self, run: Callable[[], torch.Tensor]) -> str:
        """What is wrong with a result."""
        return _fault(self.operands, run)


class _Backward(_Forward):
    """The gradient of the query; those of key and value come from the same call."""

    flops = 5

    def __init__(self, *shape) -> None:
        super().__init__(*shape)
        self._kept = cuda_hopper.forward(*self.operands, self.scale)
        self._grad = torch.randn_like(self._kept[0])

    def candidates(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Plans, and other backends."""
        arguments = (self._grad, *self.operands, *self._kept, self.scale, None)
        leaves = [t.detach().requires_grad_() for t in self.operands]

        def planned(plan):
            return lambda: cuda_hopper_backward.backward(*arguments, plan)[0]

        def peer(backend):
            out = nonlocal_attention(*leaves, backend=backend)
            return lambda: torch.autograd.grad(out, leaves, self._grad, retain_graph=True)[0]

        batch, queries, _ = leaves[0].shape
        # Of the whole batch: the order of the plans matters to nothing here.
        chunk = cuda_hopper_backward_plan.Chunk(batch, queries)
        plans = cuda_hopper_backward_plan.alternatives(Problem.of(*self.operands), chunk)
        return {str(plan): planned(plan) for plan in plans} | {name: peer(name) for name in _PEERS}

    def fault(self, run: Callable[[], torch.Tensor]) -> str:
        """What is wrong with a result."""
        return _fault(self.operands, run, self._grad)


def _fault(
    operands: list[torch.Tensor], run: Callable[[], torch.Tensor], grad: torch.Tensor | None = None
) -> str:
    """What is wrong with a result, the gradient of the query where `grad` is one of the output.

    All rows must repeat, the first and last ones pass the rule.
    """
    got = run()
    for _ in range(3):
        if not torch.equal(run(), got):
            return "results differ between runs"
    query, key, value = operands
    scale = query.shape[2] ** -0.5
    for rows in (slice(0, _CHECKED_ROWS), slice(-_CHECKED_ROWS, None)):
        part = [query[:1, rows], key[:1], value[:1]]
        wide = [t.double() for t in part]
        if grad is None:
            same, truth = (reference.attention(*each, scale) for each in (part, wide))
        else:
            given = grad[:1, rows]
            same = _gradient(part, given, scale)
            truth = _gradient(wide, given.double(), scale)
        factor = OUTPUT if grad is None else GRADIENT
        if found := excess(got[:1, rows], same, truth, factor):
            return str(found)
    return ""


def _gradient(operands: list[torch.Tensor], grad: torch.Tensor, scale: float) -> torch.Tensor:
    query, *others = operands
    query = query.detach().requires_grad_()
    return torch.autograd.grad(reference.attention(query, *others, scale), query, grad)[0]


def _measure(head: tuple[int, int], rounds: int, kind: type[_Forward]) -> None:
    timer = timing.Timer(torch.device("cuda"))
    shapes = _SHAPES[256 if head[1] == 256 else 512]
    for sizes in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(0)
            case = kind(sizes, head, dtype)
            right = {}
            for name, run in case.candidates().items():
                row = {"head": head, "sizes": sizes, "dtype": str(dtype), "plan": name}
                try:
                    fault = case.fault(run)
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    fault = str(error).splitlines()[0]
                if fault:
                    print(json.dumps({**row, "fault": fault}), flush=True)
                else:
                    right[name] = run
            batch, queries, keys = sizes
            # Nominal, as benchmarks/registry.py counts them.
            flops = case.flops * batch * queries * keys * sum(head)
            for name, samples in timing.interleave(right, timer, rounds, warmup=2).items():
                times = timing.quantiles(samples)
                row = {"head": head, "sizes": sizes, "dtype": str(dtype), "plan": name}
                row |= {"time_ms": times, "tflops": flops / times["p50"] / 1e9}
                print(json.dumps(row), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point: one process for each head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="*", default=HEADS, metavar="HEAD")
    parser.add_argument("--backward", action="store_true", help="the gradients")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        depth, value_depth = map(int, options.heads[0].split("x"))
        _measure((depth, value_depth), options.rounds, _Backward if options.backward else _Forward)
        return 0
    # Compiled here, if it has to be: the limit of time is that of kernels.
    _cuda.CUDA.load()
    failed = 0
    for head in options.heads:
        command = [sys.executable, "-m", "benchmarks.hopper_plans", head, "--alone"]
        command += ["--backward"] if options.backward else []
        try:
            code = subprocess.run(
                [*command, "--rounds", str(options.rounds)], timeout=_LIMIT_S
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            failed += 1
            why = f"ran longer than {_LIMIT_S} s" if code < 0 else f"ended with {code}"
            print(json.dumps({"head": head, "fault": why}), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
