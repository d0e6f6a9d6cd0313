"""What is not trained: frozen parameters, and batch norms that keep their running statistics."""

import fnmatch

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nlkernels.models.i3d_inception import InceptionI3D

from .config_optim import OptimConfig

# Layers in the order in which inception_nl's network registers them, numbered from 1; None are
# layers without parameters. It registers the second block in front of the layer that it follows.
_INCEPTION_ORDER = (
    "conv1a",
    None,
    "conv2b",
    "conv2c",
    None,
    "mixed3b",
    "mixed3c",
    "mixed3c.nl",
    None,
    "mixed4b",
    "mixed4c",
    "mixed4d.nl",
    "mixed4d",
    "mixed4e",
    "mixed4f",
    None,
    "mixed5b",
    "mixed5c",
    None,
    None,
    "fc",
    None,
)


def freeze(model: nn.Module, optim: OptimConfig) -> None:
    """Apply every option of the section that keeps parameters from being trained.

    Args:
        model: Its parameters lose ``requires_grad`` where they are frozen.
        optim: ``freeze``, ``only_nonlocal``, ``ft_begin_index``, ``norms``.

    Raises:
        ValueError: A pattern that no parameter matches, a network without blocks with
            ``only_nonlocal``, ``ft_begin_index`` for another network than inception_nl's, or
            ``norms: partial`` for one without batch norms.
    """
    for pattern in optim.freeze:
        _freeze_pattern(model, pattern)
    if optim.only_nonlocal:
        _freeze_all_but_blocks(model)
    if optim.ft_begin_index is not None:
        _freeze_inception(model, optim.ft_begin_index)
    for norm in norms_at_rest(model, optim):
        if optim.norms != "running":
            norm.requires_grad_(False)


def train_mode(model: nn.Module, optim: OptimConfig) -> None:
    """Training mode for all but the norms that use their running statistics.

    Args:
        model: The network itself, not its DistributedDataParallel.
        optim: ``norms``.
    """
    model.train()
    for norm in norms_at_rest(model, optim):
        norm.eval()


def norms_at_rest(model: nn.Module, optim: OptimConfig) -> list[nn.Module]:
    """Batch norms that neither use nor update statistics of batches.

    With ``partial`` these are all but the network's first one and those of blocks and gates. TSM
    leaves the statistics of its blocks' norms to the batch as well; their factors it then trains
    nowhere, so that new blocks stay the identity. Here they are trained.

    Raises:
        ValueError: ``partial`` and fewer than two norms outside of blocks.
    """
    if optim.norms == "batch":
        return []
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if optim.norms != "partial":
        return [norm for _, norm in norms]
    backbone = [norm for name, norm in norms if not {"nl", "gate"} & set(name.split("."))]
    if len(backbone) < 2:
        raise ValueError(
            f"optim: expected batch norms for optim.norms=partial, got {len(backbone)} outside of "
            "blocks; use optim.norms=batch"
        )
    return backbone[1:]


def _freeze_pattern(model: nn.Module, pattern: str) -> None:
    names = [name for name, _ in model.named_parameters()]
    chosen = fnmatch.filter(names, pattern)
    if not chosen:
        raise ValueError(
            f"optim: expected optim.freeze to match parameters, got {pattern!r} which matches none "
            f"of {len(names)} such as {names[0]!r}; correct the pattern, it covers the whole name"
        )
    for name in chosen:
        model.get_parameter(name).requires_grad_(False)


def _freeze_all_but_blocks(model: nn.Module) -> None:
    trained = [
        name for name, _ in model.named_parameters() if {"nl", "gate"} & set(name.split("."))
    ]
    if not trained:
        raise ValueError(
            "optim: expected a network with blocks for optim.only_nonlocal, got none in it; set "
            "model.blocks"
        )
    for name, parameter in model.named_parameters():
        if name not in trained and not name.startswith("fc."):
            parameter.requires_grad_(False)


def _freeze_inception(model: nn.Module, begin: int) -> None:
    if not isinstance(model, InceptionI3D):
        raise ValueError(
            "optim: expected an Inception-I3D for optim.ft_begin_index, got "
            f"{type(model).__name__}; use optim.freeze with patterns of names"
        )
    # Always, whatever the number: factors of the norms of the stem and of every first branch. The
    # published loop then freezes the convolutions of the other branches along with their norms.
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        stem_or_b0 = parts[0].startswith("conv") or parts[1] == "b0"
        other_branch = parts[1] in ("b1a", "b1b", "b2a", "b2b", "b3")
        if other_branch or (stem_or_b0 and "norm" in parts):
            parameter.requires_grad_(False)
    for layer in filter(None, _INCEPTION_ORDER[: max(0, begin - 1)]):
        for name, parameter in model.named_parameters():
            behind = f"{layer}.nl." if not layer.endswith(".nl") else "\0"
            if name.startswith(f"{layer}.") and not name.startswith(behind):
                parameter.requires_grad_(False)
