"""Values out of other systems' state dicts, whatever library made them, as tensors of our own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nlkernels._systems import COUNT_KEY, MASK_KEY


def check_prefix(where: str, prefix: object) -> None:
    """Raise TypeError unless `prefix` is text."""
    if not isinstance(prefix, str):
        raise TypeError(
            f"{where}: expected prefix to be a str, got {type(prefix).__name__}; pass what stands "
            "before the keys, or leave it out"
        )


def read(
    where: str, state_dict: Mapping[str, Any], prefix: str, ignored: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Copies of the values behind a prefix, by key without prefix.

    Args:
        where: the caller, for error messages.
        state_dict: arrays or tensors by key.
        prefix: what stands before the keys; others are left out.
        ignored: endings of keys that are left out as well.

    Returns:
        Contiguous tensors in the machine's byte order, each of its own dtype; counts in int64.

    Raises:
        TypeError: no mapping, a prefix that is no text, a key that is none behind an empty prefix,
            a value that is no array of floating-point numbers, or of integers for a count.
    """
    check_prefix(where, prefix)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{where}: expected a mapping of keys to arrays, got {type(state_dict).__name__}; "
            "pass a state_dict()"
        )
    chosen = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            _check_outside(where, key, prefix)
        elif key.startswith(prefix) and not key.endswith(ignored):
            chosen[key.removeprefix(prefix)] = _tensor(where, key, value)
    return chosen


def _check_outside(where: str, key: object, prefix: str) -> None:
    if not prefix:
        raise TypeError(
            f"{where}: expected keys to be str, got {key!r} of {type(key).__name__}; pass the "
            "state dict alone, or the prefix of the keys that are meant"
        )


def _tensor(where: str, key: str, value: Any) -> torch.Tensor:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    counts, masks = key.endswith(COUNT_KEY), key.endswith(MASK_KEY)
    if not isinstance(value, torch.Tensor) or (value.is_floating_point() == counts and not masks):
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"{where}: expected {key} to be an array or tensor of "
            f"{'integers' if counts else 'floating-point numbers'}, got {got}; "
            "pass the state dict as the other system saved it"
        )
    value = value.detach().to(torch.int64) if counts else value.detach()
    return value.clone(memory_format=torch.contiguous_format)
