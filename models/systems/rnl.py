"""region-based-non-local-network: TSM's layout with region blocks and a channel gate.

Source: guoxih/region-based-non-local-network: ops/rnl.py, models.py.
"""

from torch import nn

from nlkernels.models.systems.layout import Layout
from nlkernels.models.systems.mmaction import place
from nlkernels.models.systems.paths import unit
from nlkernels.models.systems.tsm import block_prefix, module

NAME = "rnl"


def _gate(model: nn.Module, path: str) -> str | None:
    part = unit(path)
    return None if part is None else f"base_model.{place(model, part)}.cg."


LAYOUT = Layout(
    name=NAME,
    module=module,
    block_prefix=block_prefix,
    gate_prefix=_gate,
    preset="rnl",
    anchors=("base_model.conv1.weight", "new_fc.weight"),
    marks=(".nl.penta.", ".cg."),
    flat=True,
)
detect, to_ours, from_ours = LAYOUT.detect, LAYOUT.to_ours, LAYOUT.from_ours
