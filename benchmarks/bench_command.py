"""`nlk bench`: one operation, block or network at any shape against every implementation present.

Every result is judged before its time counts; a wrong one gets no time and exit code 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import block_measure, model_cases, model_measure, parts, results, zoo_cases
from .asked import FORMS, block_case, catalogue, numbers, op_cases
from .measure import PEER_SLACK
from .model_tables import print_blocks, print_models
from .op_rows import (
    OPERATIONS,
    check_choice,
    device_of,
    exit_code,
    measured_ceilings,
    print_rows,
    rows_of,
)
from .peak import larger, state_shares
from .peers import GPU_PROVIDERS, SWEEP
from .providers import PROVIDERS, own_provider
from .registry import DTYPES
from .text import words
from .timing import keep_freed_memory

Rows = list[dict[str, Any]]

KNOWN = {
    "cpu": {**PROVIDERS, **{name: own_provider(name, name) for name in ("triton", "cuda")}},
    "cuda": {name: one for name, one in GPU_PROVIDERS.items() if name not in SWEEP},
}
"""Device -> providers of attention; a sweep over workspaces is left to `gpu_bench`."""

NOT_ASKED = {"cpu": ("cpp_avx2", "triton", "cuda"), "cuda": ("compiled", "flex", "ffpa_tma")}
"""What `--providers default` leaves out: it is compiled for long, or does not run there."""

WORDS = ("all", "default")
"""Names that stand for several providers."""


class Job(NamedTuple):
    """One problem in one dtype and pass, and how its rows are made and printed."""

    rows: Callable[[], Rows]
    show: Callable[[Sequence[dict[str, Any]]], None]


def run(options: argparse.Namespace, command: str) -> int:
    """Carries `nlk bench` out.

    Args:
        options: As `nlkernels._commands` parses them.
        command: The command line, as the JSON file states it.

    Returns:
        0, or 1 if a result was wrong or its provider raised.

    Raises:
        ValueError: An option that names nothing, or two that exclude each other.
        ImportError: --png without matplotlib.
    """
    if options.list:
        device_of(options.device, [])
        named = [*KNOWN[options.device], *(n for one in OPERATIONS.values() for n in one.functions)]
        print("\n".join(catalogue(list(dict.fromkeys(named)))))
        return 0
    jobs, schema = jobs_of(options)
    if options.png is not None:
        # Asked for before anything is measured.
        from .bench_plots import draw

        if not options.png.absolute().parent.is_dir():
            raise ValueError(f"png: expected a file in a folder that exists, got {options.png}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    kept = keep_freed_memory()
    device = torch.device(options.device)
    ceilings = _ceilings(options, device)
    environment = results.environment(device)
    header = {
        "command": command,
        "environment": environment,
        "tests": {"command": None, "outcome": "not run", "summary": ""},
        "settings": {
            "rounds": options.rounds,
            "seed": options.seed,
            "keeps_freed_memory": kept,
            **ceilings,
        },
    }
    print(f"{_machine(environment)}; {options.rounds} rounds", flush=True)
    rows = _measured(jobs(ceilings), header, schema, options)
    if options.json is not None:
        print(f"written: {options.json}")
    if options.png is not None:
        draw(rows, _machine(environment), options.png)
        print(f"written: {options.png}")
    return exit_code("nlk bench", rows)


def _measured(
    jobs: Sequence[Job], header: dict[str, Any], schema: str, options: argparse.Namespace
) -> Rows:
    file = None if options.json is None else results.ResultFile(options.json, header, schema)
    rows: Rows = []
    for job in jobs:
        found = job.rows()
        job.show(found)
        rows += found
        if file is not None:
            file.add(found)
    if schema == results.SCHEMA:
        # A machine slows down and recovers meanwhile: the larger of two measurements counts.
        ceilings = larger(
            header["settings"], measured_ceilings(torch.device(options.device), [], [""])
        )
        state_shares(rows, ceilings)
        print(_spoken(ceilings))
        if file is not None:
            file.report["settings"] = ceilings
    if file is not None:
        file.close()
    return rows


def _spoken(ceilings: dict[str, Any]) -> str:
    said = [
        f"{isa} {dtype} {rate:.0f} GFLOP/s"
        for isa, rates in ceilings["peak_gflops"].items()
        for dtype, rate in rates.items()
        if dtype != "float64"
    ]
    said.append(f"copy {ceilings['copy_gb_s']:.1f} GB/s")
    return f"\npeak of this machine: {', '.join(said)}"


def jobs_of(options: argparse.Namespace) -> tuple[Callable[[dict[str, Any]], list[Job]], str]:
    """What is measured, given the machine's ceilings, and the schema of its rows.

    Raises:
        ValueError: An option that names nothing, or two that exclude each other.
    """
    if options.target is None:
        raise ValueError(f"expected a target, got none; name one of {', '.join(FORMS)}, or --list")
    check_choice("target", [options.target], tuple(FORMS))
    if (options.name is not None) != (options.target == "model"):
        raise ValueError(
            f"expected the name of a network behind model, and only there, got {options.target} "
            f"{options.name or 'alone'}; nlk models lists them"
        )
    for what, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{what}: expected at least 1, got {value}; pass a larger number")
    dtypes = words(options.dtype)
    if options.target in ("block", "model"):
        check_choice("dtype", dtypes, model_cases.DTYPES)
        device_of(options.device, [])
        make = _block_jobs if options.target == "block" else _model_jobs
        passes = ["forward", *(["training"] if options.backward else [])]
        return make(options, [(dtype, one) for dtype in dtypes for one in passes])
    check_choice("dtype", dtypes, DTYPES)
    device_of(options.device, dtypes)
    _only_blocks(options)
    passes = ["forward", *(["forward_backward"] if options.backward else [])]
    return _op_jobs(options, [(dtype, one) for dtype in dtypes for one in passes])


def _op_jobs(options: argparse.Namespace, ways: list[tuple[str, str]]):
    cases = op_cases(options.target, options.shape, options.taps, options.channels_last)
    known = _known(options.target, options.device)
    default = [name for name in known if name not in NOT_ASKED[options.device]]
    names = _providers(options.providers, list(known), default)
    device = torch.device(options.device)

    def jobs(ceilings: dict[str, Any]) -> list[Job]:
        def rows(case: Any, dtype: str, passes: str) -> Rows:
            common = {"rounds": options.rounds, "seed": options.seed}
            if isinstance(case, parts.PartCase):
                return parts.measure(case, names, dtype, passes, device, ceilings, **common)
            return rows_of(
                case,
                names,
                dtype,
                passes,
                device,
                ceilings,
                **common,
                known={} if options.target in OPERATIONS else known,
                peer_slack=PEER_SLACK if device.type == "cuda" else 1.0,
            )

        return [
            Job(lambda case=case, way=way: rows(case, *way), print_rows)
            for case in cases
            for way in ways
        ]

    return jobs, results.SCHEMA


def _block_jobs(options: argparse.Namespace, ways: list[tuple[str, str]]):
    case = block_case(options.preset, options.kind, options.shape)
    known = block_measure.PROVIDERS
    names = _providers(options.providers, list(known), list(block_measure.DEFAULT))
    jobs = [
        Job(
            lambda way=way: block_measure.measure_blocks(case, names, _plan(options, *way)),
            print_blocks,
        )
        for way in ways
    ]
    return lambda ceilings: jobs, results.BLOCKS_SCHEMA


def _model_jobs(options: argparse.Namespace, ways: list[tuple[str, str]]):
    if options.preset is not None:
        raise ValueError(
            f"preset: expected none with model, got {options.preset}; a network has its system's"
        )
    shape = (
        None if options.shape is None else tuple(numbers("shape", options.shape, FORMS["model"]))
    )
    case = zoo_cases.zoo_case(
        options.name, shape=shape, blocks=options.blocks, kind=options.kind, width=options.width
    )
    known = [name for name in model_cases.VARIANTS if name != "grouped_naive"]
    names = _providers(
        options.providers, known, [name for name in known if name != "compiled_naive"]
    )
    jobs = [
        Job(
            lambda way=way: model_measure.measure_models(case, names, _plan(options, *way)),
            print_models,
        )
        for way in ways
    ]
    return lambda ceilings: jobs, results.MODELS_SCHEMA


def _plan(options: argparse.Namespace, dtype: str, passes: str) -> model_measure.Plan:
    device = torch.device(options.device)
    return model_measure.Plan(
        dtype, passes, device, options.rounds, options.seed, options.channels_last
    )


def _only_blocks(options: argparse.Namespace) -> None:
    for name in ("preset", "kind"):
        given = getattr(options, name)
        if given is not None:
            raise ValueError(
                f"{name}: expected none with the operation {options.target}, got {given}; it is "
                "an option of block"
            )


def _known(kind: str, device: str) -> dict[str, Any]:
    """Providers of an operation on a device."""
    if kind in parts.BACKENDS:
        return dict.fromkeys(parts.BACKENDS[kind])
    return dict(OPERATIONS[kind].functions) if kind in OPERATIONS else KNOWN[device]


def _providers(given: str, known: list[str], default: list[str]) -> list[str]:
    named = {"all": known, "default": default}
    names = [name for word in words(given) for name in named.get(word, [word])]
    check_choice("providers", names, [*known, *WORDS])
    return list(dict.fromkeys(names))


def _ceilings(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if options.target in ("block", "model"):
        return {}
    return measured_ceilings(device, words(options.dtype), [""])


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    if environment["gpu"]:
        what = environment["gpu"]["name"]
    else:
        what = (
            f"{environment['cpu_model']}, {environment['threads']} threads, "
            f"{environment['instruction_set']}"
        )
    return f"{what}; torch {versions['torch']}, nlkernels {versions['nlkernels']}"
