"""TSM: ResNets of single frames in which some channels come from the neighbouring ones."""

from nlkernels.models.recipes import MMACTION, default_places, register_resnet

# Logits of single frames, averaged; blocks from the first bottleneck of a layer on.
_TSM = {"shift": "blockres", "head": "frames", "pool2": 0}

for _depth in (50, 101):
    _PLACED = {"depth": _depth, "places": default_places(_depth, even=True)}
    register_resnet(
        f"tsm_r{_depth}", "tsm", system="tsm", preset="tsm", fc_std=0.001, **_TSM, **_PLACED
    )
    register_resnet(f"mmaction_tsm_r{_depth}", "tsm", **_TSM, **_PLACED, **MMACTION)

# Region-based blocks, and a channel gate in front of the first one.
register_resnet(
    "rnl_tsm_r50",
    "tsm",
    system="rnl",
    preset="rnl",
    blocks=5,
    gates=((2, 0),),
    layer_block={2: {"region_kernel": (3, 7, 7)}, 3: {"region_kernel": (3, 3, 3)}},
    places=default_places(50, even=True),
    fc_std=0.001,
    **_TSM,
)
