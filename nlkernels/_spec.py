"""What an operation is asked to do: the one place where operands are checked and described."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

import torch

KINDS = ("softmax", "gaussian", "dot_product", "relu")
BACKENDS = ("auto", "reference", "chunked", "cpp", "triton", "cuda", "sdpa")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Problem(NamedTuple):
    """Sizes, dtype and device of one attention call, as backends and dispatch see it.

    `device` is its type, `index` its number among those of the type (None: the current one).
    """

    batch: int
    queries: int
    keys: int
    depth: int
    value_depth: int
    dtype: torch.dtype
    device: str
    index: int | None = None

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> "Problem":
        """Describe operands that `check_operands` has accepted."""
        batch, queries, depth = query.shape
        _, keys, value_depth = value.shape
        device = query.device
        sizes = (batch, queries, keys, depth, value_depth)
        return cls(*sizes, query.dtype, device.type, device.index)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return (
            f"B={self.batch} N={self.queries} M={self.keys} D={self.depth} V={self.value_depth} "
            f"{self.dtype_name} on {self.device}"
        )


def autocasts(device: str) -> bool:
    """Whether an autocast region is active for a type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def default_scale(kind: str, depth: int) -> float:
    """The factor of the scores when a call names none: D**-0.5 for softmax, 1 for the others."""
    return depth**-0.5 if kind == "softmax" else 1.0


def describe(tensor: object) -> str:
    """Shape, dtype and device of a tensor, for error messages."""
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{tuple(tensor.shape)} {dtype} on {tensor.device}"


def check_operands(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless the three operands fit together.

    Expected are query (B,N,D), key (B,M,D) and value (B,M,V), one floating dtype, one device,
    D >= 1 and V >= 1. B, N and M may be zero here; an operation refuses what it cannot define.
    """
    operands = (query, key, value)
    for name, tensor in zip(("query", "key", "value"), operands, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"nonlocal_attention: expected {name} to be a tensor, got {type(tensor).__name__}; "
                "convert it with torch.as_tensor"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"nonlocal_attention: expected {name} to be a dense tensor, got {tensor.layout}; "
                "convert it with .to_dense()"
            )
        if tensor.dim() != 3:
            raise ValueError(
                f"nonlocal_attention: expected {name} of 3 dimensions (batch, positions, "
                f"channels), got {describe(tensor)}; "
                + (
                    "there is one head: fold heads into the batch with flatten(0, 1)"
                    if tensor.dim() == 4
                    else "add or flatten dimensions"
                )
            )
    if query.dtype not in DTYPES or any(t.dtype != query.dtype for t in operands):
        raise TypeError(
            "nonlocal_attention: expected query, key and value of one dtype out of float16, "
            f"bfloat16, float32 and float64, got {_all(operands)}; cast them, or use autocast"
        )
    if any(t.device != query.device for t in operands):
        raise ValueError(
            "nonlocal_attention: expected query, key and value on one device, got "
            f"{_all(operands)}; move them with .to(device)"
        )
    batch, _, depth = query.shape
    fits = key.shape[0] == batch and key.shape[2] == depth and value.shape[:2] == key.shape[:2]
    if not fits:
        raise ValueError(
            "nonlocal_attention: expected query (B,N,D), key (B,M,D) and value (B,M,V), got "
            f"{_all(operands)}; key and value share M, query and key share D, all share B"
        )
    if depth == 0 or value.shape[2] == 0:
        raise ValueError(
            f"nonlocal_attention: expected at least one channel, got {_all(operands)}; "
            "D and V must be 1 or more"
        )


def _all(operands: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(
        f"{name} {describe(t)}" for name, t in zip(("query", "key", "value"), operands, strict=True)
    )


def check_choice(where: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`, naming the nearest."""
    if value not in choices:
        raise ValueError(
            f"{where}: expected {name} to be one of {', '.join(choices)}, got {value!r}"
            f"{nearest(value, choices)}"
        )


def nearest(word: object, choices: Iterable[str], remedy: str = "choose one of these") -> str:
    """The last part of an error message: which of the choices was probably meant, if any.

    `remedy` stands there otherwise; that of a message which does not list them says where they are.
    """
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; {remedy}"
