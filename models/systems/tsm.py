"""temporal-shift-module: a torchvision ResNet inside wrappers for shifts and blocks.

Published files have "module." before every key, of which any prefix will do.

Source: mit-han-lab/temporal-shift-module: ops/models.py, temporal_shift.py, non_local.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.mmaction import place
from nlkernels.models.systems.paths import unit

NAME = "tsm"


def module(model: nn.Module, path: str) -> str | None:
    """Their name of a module of ours outside of blocks and gates."""
    part = unit(path)
    if part is None:
        outside = {"conv1": "base_model.conv1", "bn1": "base_model.bn1", "fc": "new_fc"}
        return outside.get(path)
    bottleneck = model.bottleneck(part.layer, part.index)
    owner, name = f"base_model.{place(model, part)}", part.inner
    if bottleneck.nl is not None or bottleneck.gate is not None:
        owner += ".block"
    if bottleneck.shift and model.design.shift == "block":
        owner += ".net"
    elif bottleneck.shift and name == "conv1":
        name += ".net"
    return f"{owner}.{name}"


def block_prefix(model: nn.Module, path: str) -> str | None:
    """What stands before the keys of the block behind a bottleneck."""
    part = unit(path)
    return None if part is None else f"base_model.{place(model, part)}.nl."


LAYOUT = Layout(
    name=NAME,
    module=module,
    block_prefix=block_prefix,
    preset="tsm",
    anchors=("base_model.conv1.weight", "new_fc.weight"),
    counter_marks=(".nl.penta.", ".cg."),
    flat=True,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
