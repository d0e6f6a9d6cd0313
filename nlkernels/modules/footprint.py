"""How much memory a block's attention takes for a given input, and how much the naive form would.

Answered from sizes alone: nothing is allocated and nothing runs.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from nlkernels import _select, _trust
from nlkernels._arguments import requested_backend
from nlkernels._spec import DTYPES, Problem
from nlkernels.modules import inputs
from nlkernels.modules.options import AXES
from nlkernels.ops import _footprint

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock

# The operation of a block's kind, where its name is another.
_OPERATION = {"gaussian": "softmax", "region_softmax": "softmax", "region_relu": "relu"}


class Footprint(NamedTuple):
    """Peak bytes of a block's attention beyond its operands and results; `print` shows one line.

    Projections, pooling, region aggregation and norm are left out: both forms have them. When
    training, gradients are operands and results too.

    Attributes:
        queries: N, of a temporal group where the block has such.
        keys: M, likewise, after pooling.
        batch: items of the attention: those of the input times its temporal groups.
        kind: of the block.
        backend: the one that runs, with the one of the backward where that is another
            ("sdpa+chunked").
        dtype: of the attention.
        training: whether the backward is included.
        naive_bytes: of the definition (backend "reference").
        bytes: at most, of the backend; None where it does not serve the block. What it keeps in
            its default workspace is included.
    """

    queries: int
    keys: int
    batch: int
    kind: str
    backend: str
    dtype: torch.dtype
    training: bool
    naive_bytes: int
    bytes: int | None

    def __str__(self) -> str:
        passes = "forward and backward" if self.training else "forward"
        dtype = str(self.dtype).removeprefix("torch.")
        own = "not served" if self.bytes is None else _size(self.bytes)
        return (
            f"N x M = {self.queries} x {self.keys}: naive {_size(self.naive_bytes)}, "
            f"{self.backend} {own} (B={self.batch}, {dtype}, {passes})"
        )


def footprint(
    block: "NonLocalBlock",
    input_size: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    training: bool = True,
) -> Footprint:
    """Memory of a block's attention for an input of `input_size`, and of the naive form.

    Args:
        block: the block.
        input_size: (B, dim, *positions), or the positions alone for B = 1.
        dtype: of the attention, as under autocast; None is that of the block's weights.
        device: where it would run; None is that of the block's weights.
        training: include the backward.

    Returns:
        A `Footprint`. Its numbers are those of `nlkernels/ops/_footprint.py`: the naive one exact,
        that of the backend at least what it takes. On GPUs they are reckoned, not measured.

    Raises:
        ValueError: the block does not take such an input; a device that torch does not know.
        TypeError: `dtype` is none that attention takes.

    Example:
        >>> import nlkernels
        >>> block = nlkernels.NonLocalBlock3d(512, kind="dot_product", backend="chunked")
        >>> print(block.footprint((8, 512, 4, 28, 28)))
        N x M = 3136 x 784: naive 119.4 MiB, chunked 6.0 MiB (B=8, float32, forward and backward)
    """
    batch, *positions = _checked(block, input_size)
    held = inputs.stored(block.out)
    dtype = held.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(
            "footprint: expected float16, bfloat16, float32 or float64, got "
            f"{dtype}; attention takes no other dtype"
        )
    device = held.device if device is None else _device(device)
    group = block.temporal_group
    if group is not None and group < positions[0]:
        batch, positions[0] = batch * (positions[0] // group), group
    pool = block.pool_size or (1,) * len(positions)
    keys = math.prod(n // p for n, p in zip(positions, pool, strict=True))
    depth = {"gaussian": block.dim, "concat": 1}.get(block.kind, block.inner)
    sizes = (batch, math.prod(positions), keys, depth, block.inner)
    problem = Problem(*sizes, dtype, device.type, device.index)
    op = _OPERATION.get(block.kind, block.kind)
    backends = _backends(op, problem, block.backend or "auto", training)
    return Footprint(
        queries=problem.queries,
        keys=problem.keys,
        batch=batch,
        kind=block.kind,
        backend="+".join(dict.fromkeys(backends)),
        dtype=dtype,
        training=training,
        naive_bytes=_footprint.naive(op, problem, training),
        bytes=_bytes(op, backends, problem, training),
    )


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"footprint: expected device to be a torch.device or its name, got {device!r}; "
            "pass 'cpu' or 'cuda', or leave it out for that of the weights"
        ) from error


def _checked(block: "NonLocalBlock", input_size: tuple[int, ...]) -> tuple[int, ...]:
    """(B, *positions) of an input that the block takes."""
    where = f"{block._name}.footprint"
    size = tuple(input_size) if isinstance(input_size, tuple | list | torch.Size) else ()
    if len(size) == block.dims:
        size = (1, block.dim, *size)
    counts = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in size)
    if len(size) != block.dims + 2 or not counts or size[1] != block.dim or 0 in size[2:]:
        axes = ", ".join(AXES[block.dims])
        raise ValueError(
            f"{where}: expected input_size (B, {block.dim}, {axes}) or ({axes}), got "
            f"{input_size!r}; pass the shape of the block's input"
        )
    inputs.check_positions(block, where, size[2:])
    return size[0], *size[2:]


def _backends(op: str, problem: Problem, backend: str, training: bool) -> tuple[str, ...]:
    """The backend of the forward, and when training that of the backward."""
    backend = requested_backend(backend, None)
    passes = ("forward", "backward") if training else ("forward",)
    if backend != "auto":
        return (backend,) * len(passes)
    # Nothing is verified, as nothing may run.
    with _trust.held():
        whole = _select.choose(op, problem, direction="training" if training else "forward")
        if whole == "sdpa" and problem.device != "cpu":
            return (whole,) * len(passes)
        inside = _select.inside(op, problem.device)
        return tuple(_select.choose(op, problem, inside, each) for each in passes)


def _bytes(op: str, backends: tuple[str, ...], problem: Problem, training: bool) -> int | None:
    if backends[0] == "reference":
        return _footprint.naive(op, problem, training)
    return _footprint.bound(op, backends, problem)


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 // 10 else f"{count / 2**10:.1f} KiB"
