"""Which bottlenecks blocks follow, by depth and by the number of blocks, as (layer, index) pairs.

The original places 5 behind every second bottleneck of layer2 and layer3 (its LAYER_MOD is 2), and
10 behind every one (1). In a ResNet-101 it spaces those of layer3 seven apart; its code has no 10
for that depth, and the paper says "the corresponding residual blocks", which here divide layer3
evenly. A single block comes before the last bottleneck of layer3.
"""

from nlkernels.models.design import Place, Placement, Places


def _places(layer2: tuple[int, ...], layer3: tuple[int, ...]) -> tuple[Place, ...]:
    return (*((2, index) for index in layer2), *((3, index) for index in layer3))


RESNET50_PLACES: dict[int, Places] = {
    0: (),
    1: _places((), (4,)),
    5: _places((1, 3), (1, 3, 5)),
    10: _places(tuple(range(4)), tuple(range(6))),
}
_RESNET101_PLACES: dict[int, Places] = {
    0: (),
    1: _places((), (21,)),
    5: _places((1, 3), (6, 13, 20)),
    10: _places(tuple(range(4)), (3, 6, 10, 13, 17, 20)),
}
ORIGINAL_PLACES: Placement = {50: RESNET50_PLACES, 101: _RESNET101_PLACES}
# PySlowFast keeps the indices of a ResNet-50 in a deeper one, too.
SLOWFAST_PLACES: Placement = {
    50: RESNET50_PLACES,
    101: {**_RESNET101_PLACES, 5: RESNET50_PLACES[5]},
}
# So does mmaction2's TSM. It, its SlowOnly, TSM and RNL start at the first bottleneck.
_EVEN = _places((0, 2), (0, 2, 4))
EVEN_PLACES: Placement = {depth: {**places, 5: _EVEN} for depth, places in ORIGINAL_PLACES.items()}
