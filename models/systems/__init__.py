"""Key layouts of every published code base's checkpoints.

Each module has `NAME`, `detect(keys)` (how sure one can be from names of keys alone, 0 to 1),
`to_ours(model, state)` and `from_ours(model, state)`. Importing and exporting gives back the same
keys and values. `nlkernels.models.convert` is the public way in.
"""

from collections.abc import Collection

from nlkernels.models.systems import (
    caffe2,
    hassony2,
    inception_nl,
    mindspore,
    mmaction,
    piergiaj,
    pytorchvideo,
    rnl,
    slowfast,
    torchvision,
    tsm,
    tushar,
)
from nlkernels.models.systems.layout import Layout

# Of those that are equally sure the first one is taken.
SYSTEMS: dict[str, Layout] = {
    module.NAME: module.LAYOUT
    for module in (
        caffe2,
        slowfast,
        pytorchvideo,
        mindspore,
        mmaction,
        rnl,
        tsm,
        inception_nl,
        hassony2,
        piergiaj,
        tushar,
        torchvision,
    )
}


def detect(keys: Collection[str]) -> dict[str, float]:
    """How sure each system is of keys, the surest first; those that are not at all are left out.

    Example:
        >>> from nlkernels.models.systems import detect
        >>> detect(["module.base_model.conv1.weight", "module.new_fc.weight"])
        {'tsm': 1.0, 'rnl': 0.5}
    """
    scores = {name: layout.detect(keys) for name, layout in SYSTEMS.items()}
    certain = sorted((name for name in scores if scores[name]), key=lambda name: -scores[name])
    return {name: scores[name] for name in certain}
