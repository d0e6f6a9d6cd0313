"""Exact, memory-efficient non-local operations for video networks.

Importing this package is cheap and has no side effects: it loads nothing else (not even torch),
touches no device and reads no environment variable. Public names are loaded on first use; the
first use also registers the operators of `torch.ops.nlkernels`.

Example:
    >>> import nlkernels
    >>> nlkernels.__version__
    '0.1.0'
"""

import importlib
import os.path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._warmup import warmup
    from .functional import (
        channel_gate,
        explain,
        nonlocal_attention,
        nonlocal_concat,
        region_aggregate,
    )
    from .modules import (
        ChannelGate,
        NonLocalBlock1d,
        NonLocalBlock2d,
        NonLocalBlock3d,
        SegmentBlock,
        set_nonlocal_backend,
    )
    from .patching import insert_nonlocal, replace_nonlocal, restore_nonlocal
    from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "ChannelGate",
    "NonLocalBlock1d",
    "NonLocalBlock2d",
    "NonLocalBlock3d",
    "SegmentBlock",
    "channel_gate",
    "explain",
    "insert_nonlocal",
    "nonlocal_attention",
    "nonlocal_concat",
    "region_aggregate",
    "replace_nonlocal",
    "restore_nonlocal",
    "set_nonlocal_backend",
    "verify",
    "warmup",
]

_HOME = {
    "ChannelGate": ".modules",
    "NonLocalBlock1d": ".modules",
    "NonLocalBlock2d": ".modules",
    "NonLocalBlock3d": ".modules",
    "SegmentBlock": ".modules",
    "channel_gate": ".functional",
    "explain": ".functional",
    "insert_nonlocal": ".patching",
    "nonlocal_attention": ".functional",
    "nonlocal_concat": ".functional",
    "region_aggregate": ".functional",
    "replace_nonlocal": ".patching",
    "restore_nonlocal": ".patching",
    "set_nonlocal_backend": ".modules",
    "verify": ".verify",
    "warmup": "._warmup",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# In a source checkout models/ and training/ are siblings of this folder; a wheel has them inside.
# Both files are asked for so that no folder of site-packages can look like a checkout.
_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if all(
    os.path.isfile(os.path.join(_root, *parts))
    for parts in (("csrc", "sources.json"), ("models", "__init__.py"))
):
    __path__.append(_root)
