"""Rows of one problem of any operation: who is asked, what ran, and how it is printed.

`bench_ops` measures registered problems with it, `nlk bench` those that a user names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import features, gate, region
from .measure import measure
from .peak import peak_gflops, state_shares
from .providers import DEFAULT, PROVIDERS, Provider
from .registry import CASES
from .text import wrapped
from .timing import copy_gb_s, gemm_tflops

OPERATIONS = {"region": region.OPERATION, "gate": gate.OPERATION}
ALL_CASES = (*CASES, *region.CASES, *gate.CASES)
ALL_PROVIDERS = dict.fromkeys([*PROVIDERS, *region.FUNCTIONS, *gate.FUNCTIONS])

BUSY_CORES = 0.1
"""Average foreign load above which a measurement is called disturbed."""


def rows_of(
    case: Any,
    names: Sequence[str],
    dtype_name: str,
    passes: str,
    device: torch.device,
    ceilings: Mapping[str, Any],
    *,
    rounds: int,
    seed: int = 0,
    known: Mapping[str, Provider] = PROVIDERS,
    peer_slack: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows of one problem, of those providers that its operation has.

    Args:
        case: Of attention, region or gate.
        names: Of providers.
        dtype_name: "float32", "bfloat16" or "float16".
        passes: "forward" or "forward_backward".
        device: Where to run.
        ceilings: As `measured_ceilings` returns them.
        rounds: Interleaved rounds, one sample per provider each.
        seed: Of operands and of the judged sample.
        known: The providers of attention by name.
        peer_slack: Multiplies the error that others' attention is allowed.
    """
    common = {"rounds": rounds, "seed": seed}
    if case.kind in OPERATIONS:
        operation = OPERATIONS[case.kind]
        own = [name for name in operation.functions if name in names]
        return features.measure(
            operation, case, dtype_name, passes, device, names=own, ceilings=ceilings, **common
        )
    providers = [known[name] for name in names if name in known]
    gemm = ceilings["gemm_tflops"][dtype_name]
    rows = measure(
        case, providers, dtype_name, passes, device, gemm=gemm, peer_slack=peer_slack, **common
    )
    state_shares(rows, ceilings)
    return rows


def measured_ceilings(
    device: torch.device, dtypes: list[str], isas: list[str]
) -> dict[str, dict[str, Any] | float]:
    """What this machine gives at best: matrix products, multiply-adds in registers, a copy."""
    return {
        "gemm_tflops": {name: gemm_tflops(device, getattr(torch, name)) for name in dtypes},
        "peak_gflops": peak_gflops(isas) if device.type == "cpu" else {},
        "copy_gb_s": copy_gb_s(device),
    }


def provider_names(given: Sequence[str]) -> list[str]:
    """Names, of which "default" stands for several.

    Raises:
        ValueError: There is no such provider.
    """
    default = [name for name in ALL_PROVIDERS if name in DEFAULT or name not in PROVIDERS]
    names = [name for word in given for name in (default if word == "default" else [word])]
    check_choice("providers", names, tuple(ALL_PROVIDERS))
    return list(dict.fromkeys(names))


def check_choice(what: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise ValueError unless all are allowed and there is one."""
    unknown = sorted(set(given) - set(allowed))
    if unknown or not given:
        raise ValueError(f"{what}: expected some of {', '.join(allowed)}, got {', '.join(unknown)}")


def device_of(name: str, dtypes: Sequence[str]) -> torch.device:
    """The device of a name.

    Raises:
        ValueError: It is not there, or too slow in one of the dtypes.
    """
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected one that exists, got cuda, but torch sees no GPU")
    if name == "cpu" and "float16" in dtypes:
        raise ValueError(
            "dtype: expected float32 or bfloat16 on a CPU, got float16; PyTorch's own float16 "
            "products there are too slow to compare with"
        )
    return torch.device(name)


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each provider of one problem."""
    first = rows[0]
    shape = " ".join(f"{letter}={size}" for letter, size in first["shape"].items())
    print(f"\n{first['case']}  {first['kind']}  {first['dtype']}  {first['pass']}  {shape}")
    for row in rows:
        label = row["provider"] + (f" ({row['backend']})" if row["backend"] else "")
        if row["status"] != "ok":
            print(wrapped(f"  {label:20} {row['status']}: {row['reason']}"), flush=True)
            continue
        times = row["time_ms"]
        over = "  ".join(
            f"{ratio:.2f}x {name}"
            for name, ratio in row["speedup_over"].items()
            if ratio is not None
        )
        share = row["share_of_peak"]
        of_peak = "" if share is None else f"{share:6.1%} of peak  "
        print(
            f"  {label:20} {times['p50']:9.2f} ms ({times['p20']:.2f} .. {times['p80']:.2f})"
            f"  {row['peak_mib']:8.1f} MiB  {of_peak}{over}",
            flush=True,
        )


def exit_code(program: str, rows: list[dict[str, Any]]) -> int:
    """1 if a provider was refused or failed; says which, and whether the machine was busy."""
    busy = max((row.get("foreign_cores") or 0.0 for row in rows), default=0.0)
    if busy > BUSY_CORES:
        print(f"{program}: other processes took {busy:.2f} cores; repeat this", file=sys.stderr)
    bad = [row for row in rows if row["status"] in ("refused", "failed")]
    for row in bad:
        print(f"{row['status']}: {row['reason']}", file=sys.stderr)
    return 1 if bad else 0
