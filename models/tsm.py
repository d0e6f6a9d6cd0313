"""TSM: ResNets of single frames in which some channels come from the neighbouring ones."""

from nlkernels.models.places import EVEN_PLACES
from nlkernels.models.recipes import MMACTION, register_resnet

# Logits of single frames, averaged; blocks from the first bottleneck of a layer on.
_TSM = {
    "shift": "blockres",
    "head": "frames",
    "pool2": 0,
    "fc_std": 0.001,
    "placement": EVEN_PLACES,
}

for _depth in (50, 101):
    register_resnet(f"tsm_r{_depth}", "tsm", depth=_depth, system="tsm", preset="tsm", **_TSM)
    register_resnet(f"mmaction_tsm_r{_depth}", "tsm", depth=_depth, **_TSM, **MMACTION)

# Region-based blocks, and a channel gate in front of the first one.
register_resnet(
    "rnl_tsm_r50",
    "tsm",
    system="rnl",
    preset="rnl",
    blocks=5,
    gates=((2, 0),),
    layer_block={2: {"region_kernel": (3, 7, 7)}, 3: {"region_kernel": (3, 3, 3)}},
    **_TSM,
)
