"""Which plan of the Hopper softmax forward is fastest: clusters, tile widths, slots of the rings.

    python -m benchmarks.hopper_plans [HEAD ...] [--rounds N] > plans.jsonl      HEAD: 512x256

One line of JSON for each shape, dtype and plan of `cuda_hopper_plan.alternatives`, beside the other
backends that serve the shape: first whether the result passes the 2x rule and repeats bit for bit,
then its time. A wrong plan is not timed. Each head runs in a process of its own with a limit of
time, for a kernel that waits for ever would hold all that follow.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch

from nlkernels import _cuda, nonlocal_attention
from nlkernels._rule import OUTPUT, excess
from nlkernels._spec import Problem
from nlkernels.ops.softmax import cuda_hopper, cuda_hopper_plan, reference

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


def _operands(sizes: tuple[int, ...], head: tuple[int, int], dtype: torch.dtype):
    batch, queries, keys = sizes
    shapes = ((queries, head[0]), (keys, head[0]), (keys, head[1]))
    return [torch.randn(batch, *each, device="cuda").to(dtype) for each in shapes]


def _fault(operands: list[torch.Tensor], run: Callable[[], torch.Tensor]) -> str:
    """What is wrong with a result: all rows must repeat, the first and last ones pass the rule."""
    out = run()
    for _ in range(3):
        if not torch.equal(run(), out):
            return "results differ between runs"
    query, key, value = operands
    scale = query.shape[2] ** -0.5
    for rows in (slice(0, _CHECKED_ROWS), slice(-_CHECKED_ROWS, None)):
        part = (query[:1, rows], key[:1], value[:1])
        truth = reference.attention(*(t.double() for t in part), scale)
        if found := excess(out[:1, rows], reference.attention(*part, scale), truth, OUTPUT):
            return str(found)
    return ""


def _candidates(operands: list[torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    scale = operands[0].shape[2] ** -0.5

    def planned(plan):
        return lambda: cuda_hopper.forward(*operands, scale, plan)[0]

    def peer(backend):
        return lambda: nonlocal_attention(*operands, backend=backend)

    plans = cuda_hopper_plan.alternatives(Problem.of(*operands))
    return {str(plan): planned(plan) for plan in plans} | {name: peer(name) for name in _PEERS}


def _measure(head: tuple[int, int], rounds: int) -> None:
    timer = timing.Timer(torch.device("cuda"))
    shapes = _SHAPES[256 if head[1] == 256 else 512]
    for sizes in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            torch.manual_seed(0)
            operands = _operands(sizes, head, dtype)
            right = {}
            for name, run in _candidates(operands).items():
                row = {"head": head, "sizes": sizes, "dtype": str(dtype), "plan": name}
                try:
                    fault = _fault(operands, run)
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    fault = str(error).splitlines()[0]
                if fault:
                    print(json.dumps({**row, "fault": fault}), flush=True)
                else:
                    right[name] = run
            batch, queries, keys = sizes
            flops = 2 * batch * queries * keys * sum(head)
            for name, samples in timing.interleave(right, timer, rounds, warmup=2).items():
                times = timing.quantiles(samples)
                row = {"head": head, "sizes": sizes, "dtype": str(dtype), "plan": name}
                row |= {"time_ms": times, "tflops": flops / times["p50"] / 1e9}
                print(json.dumps(row), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Entry point: one process for each head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="*", default=HEADS, metavar="HEAD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.alone:
        depth, value_depth = map(int, options.heads[0].split("x"))
        _measure((depth, value_depth), options.rounds)
        return 0
    # Compiled here, if it has to be: the limit of time is that of kernels.
    _cuda.CUDA.load()
    failed = 0
    for head in options.heads:
        command = [sys.executable, "-m", "benchmarks.hopper_plans", head, "--alone"]
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
