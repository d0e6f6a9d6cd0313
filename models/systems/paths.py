"""Parts of a ResNet's module paths, for the layouts."""

import re
from typing import NamedTuple

_UNIT = re.compile(r"layer(\d)\.(\d+)(?:\.(.+))?")


class Unit(NamedTuple):
    """A module inside a bottleneck: layer 1 to 4, index from 0, and its path in there."""

    layer: int
    index: int
    inner: str

    @property
    def letter(self) -> str:
        """ "a", "b" or "c" for `conv1`, `bn2` and the like."""
        return "abc"[int(self.inner[-1]) - 1]

    @property
    def is_norm(self) -> bool:
        return self.inner.startswith("bn") or self.inner == "downsample.1"

    @property
    def is_shortcut(self) -> bool:
        return self.inner.startswith("downsample")


def unit(path: str) -> Unit | None:
    """A path as a part of a bottleneck; None for one outside of all of them."""
    match = _UNIT.fullmatch(path)
    if match is None:
        return None
    return Unit(int(match[1]), int(match[2]), match[3] or "")
