"""Random trials of every operation's suite, and of whole blocks, judged by the 2x/3x rule."""

import functools
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

import nlkernels.verify  # noqa: F401  # registers every operation
from nlkernels import nonlocal_attention
from nlkernels._operations import OPERATIONS, implementation, loaded
from nlkernels._rule import GRADIENT, OUTPUT
from nlkernels.ops import concat, gate, norm, pointwise, pool, region, softmax
from tests import helpers
from tests.helpers import SHORT, assert_not_worse
from tests.modules.by_hand import BLOCKS, KINDS, REGION_KINDS, block, features
from tests.modules.test_fast import outcome

SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 127, 196, 260)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers of a result that are so many do not have plain PyTorch's errors small by luck.
_ENOUGH = 256
# By what a block's float32 results may differ beyond 3 times its layers' own error.
_ROUNDING = 1e-5


class Drawn(NamedTuple):
    """One random problem.

    Attributes:
        described: all of it.
        wrong: factor of its numbers -> AssertionError where results break the rule.
    """

    described: str
    wrong: Callable[[float], None]

    def check(self) -> None:
        """Fail where results break the rule for all of these factors.

        Plain PyTorch may be near the truth by luck, and then a right result breaks it, too.
        """
        for factor in (1.0, 1.1):
            try:
                return self.wrong(factor)
            except AssertionError:
                continue
        self.wrong(1.2)


def some(draw: random.Random, most: int, least: int = 1) -> int:
    """A size within these limits, often a remarkable one."""
    known = [n for n in SIZES if least <= n <= most]
    return draw.choice([*known, draw.randrange(least, most + 1)])


def attention(draw: random.Random, small: bool) -> NamedTuple:
    # Interpreters take long for many items.
    depth, value_depth = (some(draw, *((40, 8) if small else (260,))) for _ in range(2))
    queries, keys = (some(draw, *((70, 8) if small else (500,))) for _ in range(2))
    batch = max(
        draw.choice([1, 1, 2] if small else [1, 1, 2, 3, 9]),
        math.ceil(_ENOUGH / (min(queries, keys) * min(depth, value_depth))),
    )
    options = draw.random() < 0.5, draw.choice([None, None, 0, 0.01, 0.3]), draw.choice([1, 1, -1])
    return softmax.suite.Trial(batch, queries, keys, depth, value_depth, *options)


def concatenation(draw: random.Random, small: bool) -> NamedTuple:
    queries, keys = (some(draw, *((90, 8) if small else (700,))) for _ in range(2))
    depth = some(draw, *((40, 8) if small else (260,)))
    batch = max(draw.choice([1, 2, 3]), math.ceil(_ENOUGH / (min(queries, keys) * min(depth, 8))))
    shift = draw.choice([0, 0, 3, 100])
    return concat.suite.Trial(batch, queries, keys, depth, draw.random() < 0.5, shift)


def regions(draw: random.Random, small: bool) -> NamedTuple:
    most = (3, 7, 6) if small else (6, 24, 27)
    kernel = tuple(draw.choice([1, 3, 3, 5, 7]) for _ in range(3))
    kernel = draw.choice([(1, 3, 3), (3, 3, 1)] if small else [(3, 7, 7), (3, 3, 3), kernel])
    channels = draw.choice([5, 8]) if small else draw.choice([5, 8, 16, 17, 33, 70])
    positions = (draw.randrange(1, n + 1) for n in most)
    shape = (draw.choice([1, 2, 3]), channels, *positions)
    return region.suite.Trial(shape, kernel, draw.random() < 0.5)


def gates(draw: random.Random, small: bool) -> NamedTuple:
    positions = (draw.randrange(1, n + 1) for n in ((3, 7, 7) if small else (6, 28, 31)))
    channels = draw.choice([24, 33, 64]) if small else draw.choice([24, 33, 64, 130, 520])
    shape = (draw.choice([2, 3, 5]), channels, *positions)
    return gate.suite.Trial(shape, draw.choice(gate.suite.LAYOUTS))


def pools(draw: random.Random, small: bool) -> NamedTuple:
    window = draw.choice([(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 3), (1, 3, 3), (1, 1, 1)])
    most = (2, 4, 4) if small else (4, 14, 14)
    positions = (
        draw.randrange(1, n + 1) * size + draw.randrange(size)
        for n, size in zip(most, window, strict=True)
    )
    shape = (draw.choice([1, 2, 3]), some(draw, 9 if small else 200), *positions)
    return pool.suite.Trial(shape, window, draw.random() < 0.5)


def products(draw: random.Random, small: bool) -> NamedTuple:
    positions, depth = (some(draw, *((70, 8) if small else (260,))) for _ in range(2))
    # By a few columns torch multiplies in another order, whose sums it does not split.
    channels = some(draw, 70 if small else 260, 8)
    batch = max(draw.choice([1, 2, 3]), math.ceil(_ENOUGH / (positions * min(depth, channels))))
    layouts = tuple(draw.choice(["rows", "maps"]) for _ in range(3))
    options = draw.choice([1, 1, 2, 3]), draw.random() < 0.3
    return pointwise.suite.Trial(batch, positions, depth, channels, layouts, *options)


def norms(draw: random.Random, small: bool) -> NamedTuple:
    positions = draw.randrange(16, 50 if small else 700)
    channels = draw.randrange(8, 40 if small else 300)
    flags = (draw.random() < 0.5 for _ in range(3))
    return norm.suite.Trial(
        draw.choice([2, 3] if small else [2, 3, 9]), positions, channels, *flags
    )


def batch_norm(trial: Any, z: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, base):
    """Torch's batch norm of maps or of channels last: its sums differ with the layout."""
    form = torch.contiguous_format if trial.maps else torch.channels_last
    features = z.mT[..., None].contiguous(memory_format=form)
    out = F.batch_norm(features, None, None, gamma, beta, True, 0.0, norm.suite.EPS)
    return out.squeeze(3).mT + base


# Operation -> what draws a trial of its suite; `small` ones are for interpreters.
TRIALS = {
    "softmax": attention,
    "dot_product": attention,
    "relu": attention,
    "concat": concatenation,
    "region_aggregate": regions,
    "gate": gates,
    "pool": pools,
    "pointwise": products,
    "norm": norms,
}


def serves(name: str, backend: str, tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether a backend takes these operands on this machine."""
    operation, x = OPERATIONS[name], tensors[0]
    if name in ("pool", "pointwise", "norm"):  # whose problems have more than operands
        suite = loaded(operation.suite)
        asked = suite.problem(suite.HEADS[0], x.dtype, x.device)
    else:
        asked = operation.describe(*tensors)
    return not operation.supports(backend, asked)


def of_operation(draw: random.Random, name: str, backend: str, device: str) -> Drawn | None:
    """A trial of an operation; None where the backend does not serve it."""
    suite = loaded(OPERATIONS[name].suite)
    small = backend in ("triton", "cuda") and device == "cpu"
    trial = TRIALS[name](draw, small)
    dtype = draw.choice(DTYPES)
    *tensors, grad = suite.operands(trial, dtype, torch.device(device))
    if not serves(name, backend, tensors):
        return None
    described = f"{name} {backend} {SHORT[dtype]} {trial}"

    module = implementation(name, backend)

    def check(factor: float) -> None:
        given = [t * factor for t in (*tensors, grad)]
        # Torch's own bfloat16 convolution of one channel reads what nothing wrote.
        wide = torch.float32 if name == "region_aggregate" else dtype
        plain = batch_norm if name == "norm" else suite.definition
        truth = defined(suite, suite.definition, trial, given, torch.float64)
        same = defined(suite, plain, trial, given, wide)
        got = computed(suite, module, trial, *given)
        judge(got, {key: value.to(dtype) for key, value in same.items()}, truth)

    return Drawn(described, check)


def of_function(draw: random.Random, backend: str, device: str) -> Drawn:
    """A call of `nonlocal_attention`, which has factors and layouts that no suite has."""
    kind, dtype = draw.choice(helpers.KINDS), draw.choice(list(SHORT))
    depth, value_depth = some(draw, 260), some(draw, 260)
    sizes = (draw.choice([1, 1, 2, 3, 9]), some(draw, 500), some(draw, 500))
    case = helpers.Case(*sizes, depth, draw.choice([depth, value_depth]))
    scale, workspace = draw.choice([None, None, 0.0, 0.3, -0.5]), draw.choice([None, 0, 0.01, 0.3])
    options = {"kind": kind, "scale": scale, "workspace_mib": workspace}
    maps, seed = draw.random() < 0.5, draw.randrange(2**31)
    described = f"{backend} {SHORT[dtype]} {case} {options} {maps=} numbers={seed}"

    def check(factor: float) -> None:
        tensors = [t * factor for t in helpers.operands(case, dtype, device, seed=seed)]
        if maps:
            tensors = [t.mT.contiguous().mT for t in tensors]

        def results(backend: str, own: torch.dtype) -> dict[str, torch.Tensor]:
            call = functools.partial(nonlocal_attention, **options, backend=backend)
            return helpers.results(call, [t.to(own) for t in tensors])

        truth, same = (results("reference", own) for own in (torch.float64, dtype))
        judge(results(backend, dtype), same, truth)

    return Drawn(f"nonlocal_attention {described}", check)


def judge(
    got: dict[str, torch.Tensor], same: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]
) -> None:
    """Hold all results to the rule."""
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        factor = OUTPUT if name == "out" else GRADIENT
        assert_not_worse(name, got[name], same[name], exact, factor)


def defined(
    suite: Any, definition: Callable, trial: Any, given: list[torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Output and gradients of plain PyTorch, computed in one dtype."""
    *inputs, grad = (t.to(dtype) for t in given)
    inputs = [t.requires_grad_() for t in inputs]
    out = definition(trial, *inputs)
    grads = torch.autograd.grad(out, inputs, grad)
    return {"out": out.detach(), **dict(zip(suite.GRADIENTS, grads, strict=True))}


def computed(suite: Any, module: Any, trial: Any, *given: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a backend."""
    *tensors, grad = (t.detach() for t in given)
    with torch.no_grad():
        kept = suite.forward(module, trial, *tensors)
        grads = suite.backward(module, trial, grad, tuple(tensors), kept)
    return {"out": kept[0], **dict(zip(suite.GRADIENTS, grads, strict=True))}


def of_block(draw: random.Random, backend: str, device: str) -> Drawn:
    """A block in few passes, beside its layers one after another."""
    dims, kind = draw.choice(list(BLOCKS)), draw.choice(KINDS)
    pools = {1: [None, (2,), (3,)], 2: [None, (2, 2), (1, 3)], 3: [None, (1, 2, 2), (2, 2, 1)]}
    options = {
        "kind": kind,
        "pool": draw.choice(pools[dims]),
        "pool_order": "after" if kind in REGION_KINDS else draw.choice(["before", "after"]),
        "norm": draw.choice(["batch", "batch", "affine", None]),
        "qkv_bias": draw.random() < 0.7,
        "out_bias": draw.random() < 0.7,
    }
    if dims == 3 and draw.random() < 0.3:
        options["temporal_group"] = 2
    recompute, training, last = (draw.random() < 0.4 for _ in range(3))
    dtype = draw.choice([torch.float64, torch.float32])
    if dtype == torch.float64 and backend in ("cpp", "triton"):
        dtype = torch.float32
    frames = [2 * draw.randrange(1, 3)] if dims == 3 else []
    positions = (*frames, *(draw.randrange(4, 9) for _ in range(dims - len(frames))))
    shape = (draw.choice([1, 2, 3]), 6, *positions)
    seed = draw.randrange(2**31)
    described = f"block {backend} {SHORT[dtype]} {dims}d {shape} {options} {recompute=} {training=}"
    described += f" channels_last={last} weights={seed}"

    def check(factor: float) -> None:
        torch.manual_seed(seed)
        made = block(dims, device, **options).train(training)
        x, cotangent = (factor * features(*shape, device=device) for _ in range(2))
        x, cotangent = x.to(dtype), cotangent.to(dtype)
        if last and dims > 1:
            formats = {2: torch.channels_last, 3: torch.channels_last_3d}
            x, cotangent = (t.contiguous(memory_format=formats[dims]) for t in (x, cotangent))
        found = {}
        for name, own in (("truth", torch.float64), ("same", dtype), ("got", dtype)):
            each = block(dims, device, **options).train(training)
            each.load_state_dict(made.state_dict())
            each.to(own).set_backend(backend if name == "got" else "reference")
            each.recompute = recompute and name == "got"
            found[name] = outcome(each, x.to(own), cotangent.to(own))
            found[name] |= dict(each.named_buffers())
        assert_near(found["got"], found["same"], found["truth"], dtype)

    return Drawn(described, check)


def assert_near(
    got: dict[str, torch.Tensor],
    same: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Outputs and statistics relative to their own largest number, gradients to that of all.

    A batch norm takes off what a bias before it adds: the gradient of that is rounding alone.
    """
    largest = {key: value.abs().max().item() or 1.0 for key, value in truth.items()}
    gradients = [key for key in truth if key.startswith("d_")]
    largest |= dict.fromkeys(gradients, max(largest[key] for key in gradients))

    def errors(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            key: (found[key].double() - value.double()).abs().max().item() / largest[key]
            for key, value in truth.items()
        }

    rounding = 1e-9 if dtype == torch.float64 else _ROUNDING + 3 * max(errors(same).values())
    wrong = {key: error for key, error in errors(got).items() if not error <= rounding}
    assert not wrong, f"{wrong} of the largest number, more than {rounding:.1e}"
