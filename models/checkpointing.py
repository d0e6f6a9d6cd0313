"""Activation checkpointing of networks with batch norms."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def run(layer: nn.Module, x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Run a layer; a checkpointed one keeps its input alone for the backward.

    Batch norms take in the statistics of a batch once, though they see it twice. Compiled code
    computes again what has no effects, and takes no context.

    Args:
        layer: of a Sequential, every part keeps its own input.
        x: the input.
        checkpointing: compute the activations again in the backward.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return layer(x)
    compiling = torch.compiler.is_compiling()
    for part in layer if isinstance(layer, nn.Sequential) else (layer,):
        contexts = {} if compiling else {"context_fn": partial(_contexts, part)}
        x = checkpoint(part, x, use_reentrant=False, **contexts)
    return x


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds a layer's first run, and what its second one in the backward."""
    return nullcontext(), _untracked(layer)


@contextmanager
def _untracked(layer: nn.Module) -> Iterator[None]:
    norms = [
        module for module in layer.modules() if isinstance(module, _BatchNorm) and module.training
    ]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms if _counts(norm)]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # also where recomputing stops halfway, with all that the backward needs
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for norm, count in zip(filter(_counts, norms), counts, strict=True):
            norm.num_batches_tracked.copy_(count)


def _counts(norm: nn.Module) -> bool:
    return norm.num_batches_tracked is not None
