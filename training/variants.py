"""The networks of a comparison: what each variant's name means, and equal starting weights."""

from typing import Any

import torch
from torch import nn

from nlkernels import set_nonlocal_backend
from nlkernels.models import create_model
from nlkernels.models.zoo import describe

from .config import ModelConfig

DESCRIPTIONS = {
    "none": "no blocks",
    "naive": "non-local blocks, scores held in memory (backend reference)",
    "fast": "non-local blocks, backend chosen by auto",
    "local": "local blocks (3x3x3 convolutions) of as many parameters instead",
    "frame": "non-local blocks whose keys are limited to the query's own frame, backend auto",
}

# Of published networks without a number of their own.
_BLOCKS = 5


def build_model(config: ModelConfig, num_classes: int, *, seed: int) -> nn.Module:
    """The configured network with blocks on backend ``auto``.

    Args:
        config: Name and options; ``num_classes`` there is not used here.
        num_classes: Number of classes of the data set.
        seed: Seed of the initial weights.

    Raises:
        ValueError: Unknown name or option.
    """
    return _create(config, num_classes, seed, blocks=config.blocks, block=config.block)


def blocks_of(config: ModelConfig) -> int:
    """How many blocks the variants of a comparison get.

    Those of the configuration; where it has none, as many as were published with the network, or
    the five of most published networks.

    Raises:
        ValueError: No blocks, for a network of our own.
    """
    record = describe(config.name)
    if config.blocks == 0 and record.system is not None:
        return max((result.blocks for result in record.results), default=0) or _BLOCKS
    if config.blocks == 0:
        raise ValueError(
            "compare: expected model.blocks >= 1, got 0; the variant none is the network without "
            "blocks, set model.blocks to what the others get"
        )
    return config.blocks


def build_variant(variant: str, config: ModelConfig, num_classes: int, *, seed: int) -> nn.Module:
    """One variant of a comparison.

    All variants of one seed start from the same weights: models draw those of the blocks last, so
    none and local share the layers that they have, and naive, fast and frame are equal throughout.

    Args:
        variant: A key of ``DESCRIPTIONS``.
        config: Name and options of the network with blocks.
        num_classes: Number of classes of the data set.
        seed: Seed of the initial weights.

    Raises:
        ValueError: Unknown name or option, or a network of ours without blocks.
    """
    block = dict(config.block)
    if variant == "local":
        block["variant"] = "local"
    if variant == "frame":
        block["temporal_group"] = 1
    blocks = 0 if variant == "none" else blocks_of(config)
    model = _create(config, num_classes, seed, blocks=blocks, block=block)
    if variant in ("naive", "fast", "frame"):
        set_nonlocal_backend(model, "reference" if variant == "naive" else "auto")
    return model


def check_model(config: ModelConfig) -> None:
    """Raise what building the network would raise, without memory or time for its weights."""
    with torch.device("meta"):
        build_model(config, 2, seed=0)


def _create(
    config: ModelConfig, num_classes: int, seed: int, *, blocks: int, block: dict[str, Any]
) -> nn.Module:
    options: dict[str, Any] = {"blocks": blocks, "block": block}
    if config.dropout is not None:
        options["dropout"] = config.dropout
    torch.manual_seed(seed)
    return create_model(config.name, num_classes=num_classes, width=config.width, **options)
