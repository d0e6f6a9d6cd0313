"""Registration of low-level operators in the `nlkernels` namespace of torch.ops."""

import functools
from collections.abc import Callable

import torch

from nlkernels._spec import autocasts

_LIBRARY = torch.library.Library("nlkernels", "DEF")


def define(schema: str) -> Callable:
    """Decorator: define an operator by its schema with this function as its implementation.

    The implementation runs without autograd and without autocast: what it computes in float32 must
    stay in float32 when a caller's autocast region is active around the operator.
    """

    def register(implementation: Callable) -> Callable:
        @functools.wraps(implementation)
        def run(first: torch.Tensor, *arguments):
            device = first.device.type
            if autocasts(device):
                with torch.no_grad(), torch.autocast(device, enabled=False):
                    return implementation(first, *arguments)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    return implementation(first, *arguments)
            # As within every autograd.Function.
            return implementation(first, *arguments)

        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(schema.split("(")[0], run, "CompositeExplicitAutograd")
        return run

    return register
