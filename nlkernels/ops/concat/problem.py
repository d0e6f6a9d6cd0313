"""What the concatenation is asked to do: its operands, checked and described."""

import torch

from nlkernels._spec import DTYPES, Problem, describe

_NAMES = ("query_score", "key_score", "value")


class ConcatProblem(Problem):
    """An attention with D = 1, as a score is one channel; nobody passed that D."""

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(" D=1 ", " ")


def problem(query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor) -> Problem:
    """Describe operands that `check_operands` has accepted."""
    return ConcatProblem.of(query_score.unsqueeze(2), key_score.unsqueeze(2), value)


def check_operands(query_score: torch.Tensor, key_score: torch.Tensor, value: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless the three operands fit together.

    Expected are query_score (B,N), key_score (B,M) and value (B,M,V), one floating dtype, one
    device, V >= 1. B, N and M may be zero.
    """
    operands = (query_score, key_score, value)
    for name, tensor, rank in zip(_NAMES, operands, (2, 2, 3), strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"nonlocal_concat: expected {name} to be a tensor, got {type(tensor).__name__}; "
                "convert it with torch.as_tensor"
            )
        if tensor.layout != torch.strided:
            raise TypeError(
                f"nonlocal_concat: expected {name} to be a dense tensor, got {tensor.layout}; "
                "convert it with .to_dense()"
            )
        if tensor.dim() != rank:
            sizes = "(batch, positions)" if rank == 2 else "(batch, positions, channels)"
            raise ValueError(
                f"nonlocal_concat: expected {name} of {rank} dimensions {sizes}, got "
                f"{describe(tensor)}; "
                + (
                    "a score is one number for each position: multiply by the weights first"
                    if rank == 2 and tensor.dim() > 2
                    else "add or flatten dimensions"
                )
            )
    if value.dtype not in DTYPES or any(t.dtype != value.dtype for t in operands):
        raise TypeError(
            "nonlocal_concat: expected query_score, key_score and value of one dtype out of "
            f"float16, bfloat16, float32 and float64, got {_all(operands)}; cast them, or use "
            "autocast"
        )
    if any(t.device != value.device for t in operands):
        raise ValueError(
            "nonlocal_concat: expected query_score, key_score and value on one device, got "
            f"{_all(operands)}; move them with .to(device)"
        )
    if query_score.shape[0] != value.shape[0] or key_score.shape != value.shape[:2]:
        raise ValueError(
            "nonlocal_concat: expected query_score (B,N), key_score (B,M) and value (B,M,V), got "
            f"{_all(operands)}; key_score and value share M, all share B"
        )
    if value.shape[2] == 0:
        raise ValueError(
            f"nonlocal_concat: expected at least one channel, got {_all(operands)}; "
            "V must be 1 or more"
        )


def _all(operands: tuple[torch.Tensor, ...]) -> str:
    return ", ".join(f"{name} {describe(t)}" for name, t in zip(_NAMES, operands, strict=True))
