"""Measures blocks of every system as they are and replaced, with the same weights.

`python -m tests.patching.measure` takes each system's block at the sizes of res3 (4 and 16 frames)
and res4, forward and backward of one clip, in turns; it judges, weighs and times both and writes
`benchmarks/results/<device>/<date>-patched.json`. Blocks of packages that are not installed are the
stand-ins of these tests. What memory has no room for is said and left out.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks import results
from benchmarks.measure import Call, compare
from benchmarks.model_judge import Judge, group_of_block
from benchmarks.model_measure import too_large
from benchmarks.model_tables import print_blocks
from benchmarks.op_rows import exit_code
from benchmarks.reckoned import ReckonedMemory
from benchmarks.timing import keep_freed_memory
from nlkernels import replace_nonlocal
from tests.patching import blocks
from tests.patching.packages.ops import non_local, rnl
from tests.patching.packages.slowfast.models.nonlocal_helper import Nonlocal
from tests.patching.packages.timm.layers.non_local_attn import NonLocalAttn

# Channels, frames, height and width of the input, and the neighbourhood of a region there.
STAGES = {
    "res3/T4": ((512, 4, 28, 28), [3, 7, 7]),
    "res3/T16": ((512, 16, 28, 28), [3, 7, 7]),
    "res4/T4": ((1024, 4, 14, 14), [3, 3, 3]),
}
# System and kind -> (channels, neighbourhood) -> its block.
SYSTEMS: dict[str, Callable[[int, list[int]], nn.Module]] = {
    "slowfast-softmax": lambda c, _: Nonlocal(c, c // 2, (1, 2, 2)),
    "slowfast-dot_product": lambda c, _: Nonlocal(c, c // 2, (1, 2, 2), "dot_product"),
    "alexhex7-gaussian": lambda c, _: blocks.non_local_gaussian.NONLocalBlock3D(c),
    "alexhex7-softmax": lambda c, _: blocks.non_local_embedded_gaussian.NONLocalBlock3D(c),
    "alexhex7-dot_product": lambda c, _: blocks.non_local_dot_product.NONLocalBlock3D(c),
    "alexhex7-concat": lambda c, _: blocks.non_local_concatenation.NONLocalBlock3D(c),
    "tsm-softmax": lambda c, _: non_local.NONLocalBlock3D(c),
    "timm-softmax": lambda c, _: NonLocalAttn(c),
    "rnl-region_softmax": lambda c, kernel: rnl.NONLocalBlock3D(c, 2, kernel, False),
}


class Case(NamedTuple):
    """A system's block at one size; (B, C, T, H, W), of images (T, C, H, W)."""

    system: str
    stage: str

    @property
    def shape(self) -> tuple[int, ...]:
        channels, frames, *positions = STAGES[self.stage][0]
        if self.system.startswith("timm"):
            return (frames, channels, *positions)
        return (1, channels, frames, *positions)

    def block(self, seed: int = 0) -> nn.Module:
        """The system's own, whose every weight matters."""
        torch.manual_seed(seed)
        made = SYSTEMS[self.system](self.shape[1], STAGES[self.stage][1])
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
                nn.init.ones_(module.weight)
        return made.train()


def step(block: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of input and weights, by name."""
    x = x.detach().requires_grad_()
    wanted = {name: p for name, p in block.named_parameters() if p.requires_grad}
    out = block(x)
    grads = torch.autograd.grad(out, [x, *wanted.values()], grad)
    return {"out": out.detach(), **dict(zip(["x", *wanted], grads, strict=True))}


def measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of one block: "original" and "patched"."""
    theirs = case.block()
    ours = copy.deepcopy(theirs)
    (row,) = replace_nonlocal(ours)
    x, grad = (torch.randn(case.shape) for _ in range(2))
    head = {
        "case": f"{row.system}/{case.stage}",
        "kind": row.kind,
        "dtype": "float32",
        "pass": "training",
        "shape": dict(zip("BCTHW" if x.dim() == 5 else "BCHW", case.shape, strict=True)),
        "pool_order": row.pool_order or "neither before nor after",
        "also": [],
        "channels_last": False,
    }
    if reason := too_large(reckoned_mib(case), 0.0, x.device):
        no = {**head, "backend": None, "status": "unserved", "reason": reason}
        return [{**no, "provider": name} for name in ("original", "patched")]
    judge = Judge.of(lambda x: step(theirs, x, grad), x, group_of_block)
    calls = {
        "original": Call(lambda: step(theirs, x, grad)),
        "patched": Call(lambda: step(ours, x, grad)),
    }
    found = compare(head, calls, judge, x.device, rounds=rounds)
    footprint = ours.footprint(tuple(x.shape), training=True)
    few = ours.nonlocal_view(ours).few(x)
    for each in found:
        each |= {"kept_mib": None, "best_other": "original", "judged_by": "original"}
        if each["provider"] == "patched":
            # A block leaves few scores to its own forward.
            each["backend"] = "own forward" if few else footprint.backend
            each["scores"] = footprint.queries * footprint.keys
        if all(one["status"] == "ok" for one in found):
            ratio = found[0]["time_ms"]["p50"] / each["time_ms"]["p50"]
            each["speedup_over"] = {"naive": None, "best_other": ratio}
    return found


def slower(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Case -> speed over the original, of replaced blocks that take over 1.05 times as long."""
    speeds = {
        row["case"]: row["speedup_over"]["best_other"]
        for row in rows
        if row["provider"] == "patched" and row["status"] == "ok"
    }
    return {case: speed for case, speed in speeds.items() if speed < 1 / 1.05}


def reckoned_mib(case: Case) -> float:
    """Peak of the system's own step, without running it."""
    with FakeTensorMode(), ReckonedMemory() as peak:
        step(case.block(), torch.empty(case.shape), torch.empty(case.shape))
    return peak.live_mib


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where a replaced block is wrong, fails, or is slower than the original."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m tests.patching.measure")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="separated by commas")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(given)
    environment = results.environment(torch.device("cpu"))
    header = {
        "command": results.command_line("tests.patching.measure", given),
        "environment": environment,
        "tests": results.run_tests([]),
        "settings": {"rounds": options.rounds, "keeps_freed_memory": keep_freed_memory()},
    }
    path = options.out or results.default_path(environment["slug"], "-patched")
    file = results.ResultFile(path, header, results.BLOCKS_SCHEMA)
    for stage in options.stages.split(","):
        for system in options.systems.split(","):
            rows = measured(Case(system, stage), options.rounds)
            file.add(rows)
            print_blocks(rows)
    file.close()
    print(f"written: {file.path}")
    late = slower(file.report["rows"])
    for where, speed in late.items():
        print(f"{where}: replaced, a step takes {1 / speed:.2f} times as long", file=sys.stderr)
    return exit_code("measure", file.report["rows"]) or int(bool(late))


if __name__ == "__main__":
    raise SystemExit(main())
