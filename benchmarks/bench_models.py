"""Measures networks and blocks: what non-local blocks cost in a training step, and in memory.

`python -m benchmarks.bench_models` sets networks with naive and with fast blocks beside the same
network without blocks; `--blocks-only` measures one block beside those of other packages;
`--memory-only` runs nothing and reckons memory and FLOPs of any size in seconds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nlkernels.modules.options import BLOCK_KINDS
from nlkernels.training.memory import check_gib

from . import block_measure, results
from .model_cases import (
    DEFAULT,
    DTYPES,
    MODELS,
    SETTINGS,
    VARIANTS,
    ModelCase,
    check_at_least,
    check_choice,
    select,
)
from .model_measure import Plan, measure_models
from .model_steps import PASSES
from .model_tables import print_blocks, print_models
from .op_rows import exit_code
from .text import words
from .timing import keep_freed_memory


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line of `python -m benchmarks.bench_models`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_models", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--models", type=words, default=list(MODELS), help=", ".join(MODELS))
    add("--settings", type=words, default=["8x8"], help=", ".join(SETTINGS))
    add("--sizes", type=words, default=["224"], help="height and width of a clip in pixels")
    add("--blocks", type=words, default=["5"], help="numbers of blocks: 1, 5, 10")
    add("--kind", default="softmax", help=", ".join(BLOCK_KINDS))
    add("--batch", default="1", help="clips of a step")
    add("--width", default="1.0", help="multiplier of the channels")
    variants = [*VARIANTS, *block_measure.PROVIDERS]
    add("--variants", type=words, default=None, help=", ".join(dict.fromkeys(variants)))
    add("--dtype", type=words, default=["float32"], help="float32, bfloat16 (autocast)")
    add("--passes", type=words, default=["training"], help=", ".join(PASSES))
    add("--channels-last", action="store_true", help="clips and weights in channels_last_3d")
    add("--blocks-only", action="store_true", help="one block at a time, not whole networks")
    add("--pool-orders", type=words, default=list(block_measure.ORDERS), help="of --blocks-only")
    add("--memory-only", action="store_true", help="run nothing: memory and FLOPs are reckoned")
    add("--fits", default=None, metavar="GIB", help="find the largest batch that GIB hold")
    add("--rounds", default="7", help="interleaved rounds")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, default=None, help="CPU threads; torch's default if absent")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=None, help="default: results/<device>/<date>-models.json")
    add("--commit", default=None, help="commit to record where git cannot tell")
    add("--tests", type=words, default=[], help="test paths that must pass first")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 if a variant was refused or failed, or 2 if nothing could be run."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(given)
    try:
        jobs, plans = checked(options)
    except ValueError as error:
        print(f"bench_models: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keeps_freed_memory = keep_freed_memory()
    tests = results.run_tests(options.tests)
    if tests["outcome"] == "failed":
        said = tests["summary"]
        print(f"bench_models: the tests fail, nothing is measured: {said}", file=sys.stderr)
        return 2
    file = _open(given, options, tests, keeps_freed_memory)
    show = print_blocks if options.blocks_only else print_models
    for job in jobs:
        for plan in plans:
            rows = job(plan)
            file.add(rows)
            show(rows)
    file.close()
    print(f"written: {file.path}")
    return exit_code("bench_models", file.report["rows"])


Job = Callable[[Plan], list[dict[str, Any]]]


def checked(options: argparse.Namespace) -> tuple[list[Job], list[Plan]]:
    """What is measured, case by case, and how; nothing is built yet.

    Raises:
        ValueError: An option that names nothing, or two that exclude each other.
    """
    check_choice("kind", [options.kind], BLOCK_KINDS)
    check_choice("dtype", options.dtype, DTYPES)
    check_choice("passes", options.passes, PASSES)
    cases = select(
        options.models,
        options.settings,
        _numbers("sizes", options.sizes, int),
        _numbers("blocks", options.blocks, int),
        kind=options.kind,
        batch=_number("batch", options.batch, int),
        width=_number("width", options.width, float),
    )
    rounds = _number("rounds", options.rounds, int)
    check_at_least("rounds", [rounds], 1, "each is a sample of every variant")
    gib = None if options.fits is None else _number("fits", options.fits, float)
    if gib is not None:
        check_gib("fits", gib)
    device = _device(options)
    plans = [
        Plan(dtype, passes, device, rounds, options.seed, options.channels_last, gib)
        for dtype in options.dtype
        for passes in options.passes
    ]
    jobs = _block_jobs(options, cases) if options.blocks_only else _model_jobs(options, cases)
    return jobs, plans


def _model_jobs(options: argparse.Namespace, cases: Sequence[ModelCase]) -> list[Job]:
    variants = list(DEFAULT) if options.variants is None else options.variants
    check_choice("variants", variants, tuple(VARIANTS))
    if len(set(variants)) != len(variants):
        raise ValueError(f"variants: expected each once, got {', '.join(variants)}; drop one")
    return [
        lambda plan, case=case: measure_models(
            case, variants, plan, memory_only=options.memory_only
        )
        for case in cases
    ]


def _block_jobs(options: argparse.Namespace, cases: Sequence[ModelCase]) -> list[Job]:
    known = block_measure.PROVIDERS
    providers = list(block_measure.DEFAULT) if options.variants is None else options.variants
    check_choice("variants", providers, tuple(known))
    check_choice("pool-orders", options.pool_orders, block_measure.ORDERS)
    if options.fits is not None:
        raise ValueError(
            "fits: expected no --fits with --blocks-only, got both; a batch fits a network"
        )
    # The blocks of all networks are the same.
    one_model = [case for case in cases if case.model == cases[0].model]
    return [
        lambda plan, case=case: block_measure.measure_blocks(
            case, providers, plan, memory_only=options.memory_only
        )
        for case in block_measure.block_cases(one_model, options.pool_orders)
    ]


def _open(
    given: list[str], options: argparse.Namespace, tests: dict[str, Any], keeps_freed_memory: bool
) -> results.ResultFile:
    environment = results.environment(torch.device(options.device), options.commit)
    ending = "-blocks" if options.blocks_only else "-models"
    path = options.out or results.default_path(environment["slug"], ending)
    header = {
        "command": results.command_line("benchmarks.bench_models", given),
        "environment": environment,
        "tests": tests,
        "settings": {
            "rounds": int(options.rounds),
            "seed": options.seed,
            "keeps_freed_memory": keeps_freed_memory,
            "fits_gib": None if options.fits is None else float(options.fits),
            "memory_only": options.memory_only,
        },
    }
    schema = results.BLOCKS_SCHEMA if options.blocks_only else results.MODELS_SCHEMA
    return results.ResultFile(path, header, schema)


def _number(what: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(
            f"{what}: expected a number, got {text!r}; write for example --{what} 1"
        ) from error


def _numbers(what: str, texts: Sequence[str], kind: type) -> list[Any]:
    return [_number(what, text, kind) for text in texts]


def _device(options: argparse.Namespace) -> torch.device:
    if options.device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {options.device}; take one of these")
    if options.device == "cuda" and options.memory_only:
        raise ValueError(
            "device: expected cpu with --memory-only, got cuda; sizes of tensors are the same on a "
            "GPU, scratch of its kernels is not known"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected one that exists, got cuda, but torch sees no GPU; take --device cpu"
        )
    return torch.device(options.device)


if __name__ == "__main__":
    raise SystemExit(main())
