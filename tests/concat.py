"""Problems of the concatenation."""

import torch

from nlkernels import _launch, nonlocal_concat
from nlkernels.ops.concat import reference

NAMES = ("out", "d_query_score", "d_key_score", "d_value")
# Held to the 2x/3x rule; "reference" is the definition.
BACKENDS = ("chunked", "auto")


def operands(case, dtype=torch.float64, device="cpu", shift=0.0):
    """Random query_score, key_score, value and a gradient for the output, of sizes (B, N, M, V).

    The scores lie around shift and -shift.
    """
    batch, queries, keys, depth = case
    generator = torch.Generator().manual_seed(0)
    sizes = ((queries,), (keys,), (keys, depth), (queries, depth))
    drawn = [torch.randn(batch, *size, generator=generator, dtype=torch.float64) for size in sizes]
    drawn[0] += shift
    drawn[1] -= shift
    return [t.to(dtype).to(device) for t in drawn]


def results(aggregate, query_score, key_score, value, grad):
    """Output and gradients of aggregate(query_score, key_score, value)."""
    inputs = [t.detach().requires_grad_() for t in (query_score, key_score, value)]
    out = aggregate(*inputs)
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad)), strict=True))


def run(backend):
    """The public operation in one backend."""
    return lambda *tensors: nonlocal_concat(*tensors, backend=backend)


def naive(*tensors):
    """Output and gradients of the definition, without dispatch, in the operands' dtype."""
    return results(reference.attend, *tensors)


def collected(call, architecture=90):
    """Kernel names and options of what a call launches; nothing runs."""
    found = []

    def collect(kernel, grid, arguments, options):
        found.append((kernel.__name__, options))

    with _launch.pretend(architecture=architecture, launcher=collect):
        call()
    return found
