"""Softmax forward by the kernels for Hopper (sm_90a): tensor copies, wgmma, specialised warps.

    out = softmax(scale query key^T) value, stats (2,B,N): see `op.py`

`cuda_hopper_plan` says which kernel runs what. Weights carry a factor 2^-shift, so that sums of M
weighted values stay below the largest value; float16 has no values large enough to need it.
Memory beyond inputs and outputs: none. Bitwise repeatable: every sum is one thread's, in one order.

Unverified: no GPU has run these kernels; the tests run them in a model of the machine.
"""

from collections.abc import Callable

import torch

from nlkernels import _cuda, _launch
from nlkernels._ext import DTYPES
from nlkernels._spec import Problem
from nlkernels.ops._tiles import LOG2E
from nlkernels.ops.softmax import cuda_hopper_plan
from nlkernels.ops.softmax.cuda_hopper_plan import Plan

_SMALLEST = 2.0**-149


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a Hopper kernel can run the forward of these operands."""
    return not unserved(query, key, value)


def unserved(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    unplanned: Callable[[Problem], str] = cuda_hopper_plan.unserved,
) -> str:
    """Why no Hopper kernel can run the forward of these operands; "" when one can.

    `unplanned` says why none takes a problem; that of another pass asks about its kernels.
    """
    if (architecture := _cuda.architecture(query)) != 90:
        return f"its kernels are for compute capability 9.0, not {architecture / 10}"
    if reason := unplanned(Problem.of(query, key, value)):
        return reason
    if 0 in (*query.shape, *key.shape):
        return "there is nothing to compute"
    return "" if channel_first(query, key, value) is not None else undescribed(query, key, value)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N) of operands that are served.

    `plan`: one of `cuda_hopper_plan.alternatives`, in the place of the predicted best.
    """
    problem = Problem.of(query, key, value)
    if plan is None:
        plan = cuda_hopper_plan.plan(problem, bool(channel_first(query, key, value)))
    out = query.new_empty(problem.batch, problem.queries, problem.value_depth)
    stats = query.new_empty(2, problem.batch, problem.queries, dtype=torch.float32)
    shift = 0 if query.dtype == torch.float16 else problem.keys.bit_length()
    _cuda.module(query).hopper_forward(
        _cuda.stream(query),
        plan,
        DTYPES[query.dtype],
        multiprocessors(query.device),
        (factor(scale), float(shift), 2.0**shift),
        problem[:5],
        _cuda.operand(query),
        _cuda.operand(key),
        _cuda.operand(value),
        out.data_ptr(),
        stats.data_ptr(),
    )
    return out, stats


def factor(scale: float) -> float:
    """scale log2(e). A zero becomes the smallest float32: weights are 1 to the last bit but one,
    and masked products, which are infinite, still weigh nothing."""
    product = scale * LOG2E
    return product if abs(product) >= _SMALLEST else _SMALLEST


def multiprocessors(device: torch.device) -> int:
    """How many blocks run at a time; 2 in the tests' model of the machine."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def channel_first(*operands: torch.Tensor) -> bool | None:
    """Whether tensor copies read the operands with positions innermost; None when with neither."""
    for innermost in (False, True):
        if not any(undescribable(tensor, innermost) for tensor in operands):
            return innermost
    return None


def undescribable(tensor: torch.Tensor, channel_first: bool) -> str:
    """Why tensor copies cannot read a tensor in that order; "" when they can."""
    # The stride of a single item is never used, and may be anything.
    tensor = tensor[0] if tensor.shape[0] == 1 else tensor
    return _launch.undescribable(tensor, -2 if channel_first else -1)


def undescribed(*operands: torch.Tensor) -> str:
    """Why tensor copies cannot read operands that are to be rows."""
    for name, tensor in zip(("query", "key", "value"), operands, strict=True):
        if reason := undescribable(tensor, channel_first=False):
            return f"tensor copies cannot read {name}: {reason}"
    return ""
