"""Which blocks of which systems are known: by the path of their class, without importing any.

A path is that of the class itself, in the package that its authors publish or as the end of a
longer path where it was copied into another program.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from nlkernels.patching.foreign import AlexHex7, Mmcv, PoolFirst, Region, Timm
from nlkernels.patching.view import View, path_of


class System(NamedTuple):
    """One system's blocks.

    Attributes:
        name: of the system.
        module: pattern of the whole module path.
        name_of_class: pattern of the class's qualified name.
        view: how a block is computed here.
    """

    name: str
    module: str
    name_of_class: str
    view: type[View]


_ANYWHERE = r"(.*\.)?"
# Several systems give the class that computes and those for one number of dimensions these names.
_BLOCKS = "_NonLocalBlockND|NONLocalBlock[123]D"
SYSTEMS = (
    System("pytorchvideo", r"pytorchvideo\.layers\.nonlocal_net", "NonLocal", PoolFirst),
    System("slowfast", r"slowfast\.models\.nonlocal_helper", "Nonlocal", PoolFirst),
    System("mmcv", r"mmcv\.cnn\.bricks\.non_local", "NonLocal[123]d", Mmcv),
    System(
        "alexhex7",
        r"non_local_(gaussian|embedded_gaussian|dot_product|concatenation)",
        _BLOCKS,
        AlexHex7,
    ),
    System("tsm", "non_local", _BLOCKS, AlexHex7),
    System("timm", r"timm\.(models\.)?layers\.non_local_attn", "NonLocalAttn", Timm),
    # Its ChannelGate has one row of weights a clip, which no N x M matrix is saved on.
    System("rnl", "rnl", _BLOCKS, Region),
)


def system_of(cls: type) -> System | None:
    """The system that a class belongs to by its path."""
    for system in SYSTEMS:
        named = re.fullmatch(_ANYWHERE + system.module, cls.__module__) and re.fullmatch(
            system.name_of_class, cls.__qualname__
        )
        if named:
            return system
    return None


def view_of(cls: type[nn.Module]) -> type[View]:
    """How blocks of a class that `system_of` knows are computed here."""
    return system_of(cls).view


class Found(NamedTuple):
    """A module that is, or derives from, a known block.

    Attributes:
        name: in the model; "" for the model itself.
        module: it.
        system: whose block it is.
        refusal: why it cannot be replaced; "" if it can.
    """

    name: str
    module: nn.Module
    system: System
    refusal: str


def find(model: nn.Module) -> Iterator[Found]:
    """Known blocks of a model, in its own order."""
    for name, module in model.named_modules():
        ancestors = type(module).__mro__
        matched = ((cls, system_of(cls)) for cls in ancestors if cls is not object)
        known = next(((cls, system) for cls, system in matched if system is not None), None)
        if known is not None:
            yield Found(name, module, known[1], _refusal(module, *known))


def _refusal(module: nn.Module, known: type, system: System) -> str:
    own = type(module)
    if "nonlocal_original" in own.__dict__:
        return "it is replaced or extended already; call restore() of that report first"
    if own is not known:
        return f"{path_of(own)} is a subclass of {path_of(known)}, which may compute something else"
    if "forward" in vars(module):
        return "its instance has a forward of its own; delete that attribute first"
    owner = next(cls for cls in own.__mro__ if "forward" in vars(cls))
    forward = vars(owner)["forward"]
    expected = (owner.__module__, f"{owner.__qualname__}.forward")
    got = (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None))
    if got != expected or hasattr(forward, "__wrapped__"):
        return f"the forward of {path_of(owner)} was exchanged for {got[0]}.{got[1]}"
    return system.view(module).refuses()
