"""Problems of the staged softmax kernels, and how their results are judged."""

import itertools
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nlkernels.ops.softmax import reference, triton_backward, triton_staged
from tests.helpers import SHORT, Case, assert_not_worse, operands

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
POSITIONS = (1, 2, 15, 16, 17, 63, 65, 127, 1037)
CHANNELS = (1, 3, 16, 40, 64, 80, 128, 256, 512)
NAMES = ("out", "d_query", "d_key", "d_value")


def pairwise(*factors: tuple, seed: int = 0) -> list[tuple]:
    """Few rows in which any two values of different factors meet at least once."""
    choose = random.Random(seed)
    places = list(itertools.combinations(range(len(factors)), 2))
    left = {(i, j, a, b) for i, j in places for a, b in itertools.product(factors[i], factors[j])}

    def covered(row: list) -> set:
        return {(i, j, row[i], row[j]) for i, j in places}

    rows = []
    while left:
        i, j, a, b = min(left, key=str)
        tries = [[choose.choice(values) for values in factors] for _ in range(50)]
        for row in tries:
            row[i], row[j] = a, b
        best = max(tries, key=lambda row: len(covered(row) & left))
        left -= covered(best)
        rows.append(tuple(best))
    return rows


def problems() -> list[tuple[Case, torch.dtype]]:
    """A pairwise cover of positions, channels and dtypes, then the widest channels."""
    rows = pairwise(POSITIONS, POSITIONS, CHANNELS, CHANNELS, DTYPES)
    rows += [(17, 65, 1024, 512, dtype) for dtype in DTYPES]
    rows += [(15, 63, 1024, 1024, torch.bfloat16), (65, 2, 16, 1024, torch.float32)]
    found = []
    for queries, keys, depth, value_depth, dtype in rows:
        # Enough numbers that the errors of PyTorch's own are not small by luck.
        batch = -(-128 // min(128, min(queries, keys) * min(depth, value_depth)))
        batch = min(batch, 16, -(-2048 // max(queries, keys)))
        found.append((Case(batch, queries, keys, depth, value_depth), dtype))
    return found


def half(first: int) -> list:
    """Every second problem from `first` on, as parameters of a test; most are long tests."""
    found = []
    for number, (case, dtype) in enumerate(problems()[first::2]):
        long = number >= 20 or 1037 in (case.queries, case.keys)
        name = f"{case}-{SHORT[dtype]}"
        found.append(pytest.param(case, dtype, id=name, marks=[pytest.mark.gate] * long))
    return found


def made(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[torch.Tensor]:
    """Random query, key, value and grad."""
    return operands(case, dtype, device, seed=seed)


def run(
    tensors: list[torch.Tensor], scale: float, workspace_mib: float | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients of the staged kernels."""
    *qkv, grad = tensors
    out, stats = triton_staged.forward(*qkv, scale, workspace_mib)
    grads = triton_backward.backward(grad, *qkv, out, stats, scale, workspace_mib)
    return dict(zip(NAMES, (out, *grads), strict=True))


def naive(tensors: list[torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Output and gradients of the definition, in the operands' dtype."""
    *qkv, grad = tensors
    qkv = [t.detach().requires_grad_() for t in qkv]
    out = reference.attention(*qkv, scale)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, qkv, grad)), strict=True))


def judge(got: dict[str, torch.Tensor], tensors: list[torch.Tensor], scale: float) -> None:
    """Hold what is in `got` to the 2x/3x rule."""
    same, truth = naive(tensors, scale), naive([t.double() for t in tensors], scale)
    for key, result in got.items():
        assert_not_worse(key, result, same[key], truth[key], 2 if key == "out" else 3)


def nan_like(tensor: torch.Tensor, before: int, after: int, *, channel_first: bool) -> torch.Tensor:
    """The same numbers in the middle of a buffer of NaN."""
    if channel_first:
        return nan_like(tensor.mT, before, after, channel_first=False).mT
    items, rows, channels = tensor.shape
    more = before + after
    buffer = tensor.new_full((items + 2, rows + more, channels + more), float("nan"))
    inside = buffer[1:-1, before : before + rows, before : before + channels]
    return inside.copy_(tensor)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with no unit stride, NaN between them."""
    items, rows, channels = tensor.shape
    buffer = tensor.new_full((items, 2 * rows, 3 * channels), float("nan"))
    return buffer[:, ::2, 1::3].copy_(tensor)


LAYOUTS = {
    "channel_first": lambda t: t.mT.contiguous().mT,
    "sliced": sliced,
    # Rows and channels that are multiples of 8 keep their alignment inside, or lose it.
    "inside_aligned": lambda t: nan_like(t, 8, 16, channel_first=False),
    "inside_channel_first": lambda t: nan_like(t, 8, 16, channel_first=True),
    "inside_off_by_one": lambda t: nan_like(t, 1, 2, channel_first=False),
    "channel_first_off_by_one": lambda t: nan_like(t, 1, 2, channel_first=True),
}


class Peak(TorchDispatchMode):
    """Most bytes of storage alive at once of what was allocated inside the context."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Products allocate nothing themselves; one's meta kernel takes out_dtype for beta.
        product = func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        result = kwargs["out"] if product and "out" in kwargs else func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if not self._users.get(key):
            self._users[key] = 0
            self._now += size
            self.bytes = max(self.bytes, self._now)
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self._now -= size


# Sizes and workspaces at which memory is counted; a workspace of None is the default.
MEASURED = [
    (Case(8, 3136, 784, 512, 512), torch.bfloat16, None),
    (Case(8, 3136, 784, 256, 256), torch.bfloat16, 8),
    (Case(2, 12544, 3136, 64, 512), torch.float16, None),
    (Case(1, 12544, 3137, 256, 64), torch.float16, 1),
    (Case(3, 784, 196, 1024, 512), torch.bfloat16, None),
    (Case(2, 1568, 393, 512, 256), torch.float32, 2),
    (Case(64, 1, 5, 3, 7), torch.float32, None),
]


def rows_of_a_tile(case: Case, bytes_per_score: int, itemsize: int, mib: float | None) -> int:
    """The most rows, of all items, that one tile of the staged kernels may have."""
    width = case.keys + -case.keys % 8
    allowed = max(
        128 * case.batch * width * bytes_per_score,
        case.batch * case.queries * width * itemsize // 8,
    )
    allowed = min((40 if mib is None else mib) * 2**20, allowed)
    return max(16, int(allowed) // (width * bytes_per_score))


def meta(case: Case) -> list[torch.Tensor]:
    """Query, key, value and grad of the case, without memory."""
    sizes = (
        (case.queries, case.depth),
        (case.keys, case.depth),
        (case.keys, case.value_depth),
        (case.queries, case.value_depth),
    )
    return [torch.empty(case.batch, *size, device="meta") for size in sizes]
