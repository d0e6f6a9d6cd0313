"""The instruction sets that C++ kernels are built for, one after another."""

import platform

import pytest

from nlkernels import _build, _ext

# Lowest first.
ISAS = list(_build.ISAS) if platform.machine() == "x86_64" else ["portable"]


def use(isa: str, context: pytest.MonkeyPatch) -> None:
    """Make kernels take `isa` until the context ends; skips where it does not run."""
    context.setenv("NLKERNELS_CPU_ISA", isa)
    if reason := _ext.missing():
        pytest.skip(reason)
    assert _ext.load().isas[isa] == _ext.isa()
