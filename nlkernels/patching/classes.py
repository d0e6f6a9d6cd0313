"""Classes that stand in the place of a module's own: the module itself stays the same object.

A module whose class is exchanged keeps its parameters, buffers, children, hooks, mode and name, and
whoever refers to it. The exchanged class derives from the module's own, so that isinstance holds.
Copies and pickles of such a module are exchanged modules, too: a pickle names the module's own
class, and loading it needs nlkernels beside the other package.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nlkernels._select import Explanation
from nlkernels._spec import BACKENDS, check_choice
from nlkernels.modules.footprint import Footprint
from nlkernels.patching.view import View

# The name under which an inserted block's place is kept in its module.
PLACE = "nonlocal_place"
# What a replaced block keeps in its instance; None means unset.
_OPTIONS = ("backend", "fused", "recompute")
# The token of a module's last exchange: a report gives back no exchange but its own.
_last: WeakKeyDictionary[nn.Module, object] = WeakKeyDictionary()


class Exchanged:
    """What both kinds of exchanged classes share; see `exchange` and `give_back`."""

    nonlocal_original: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        kind = next(kind for kind in (Replaced, Extended) if isinstance(self, kind))
        return _revive, (kind, self.nonlocal_original), self.__getstate__()


class Replaced(Exchanged):
    """A block of another system that is computed here.

    Its attributes `fused` and `recompute` are those of our own blocks.
    """

    nonlocal_view: ClassVar[Callable[[nn.Module], View]]
    is_nonlocal = True
    backend: str | None = None
    fused: bool | None = None
    recompute = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own; its own runs where more than the output is asked for, or little."""
        view = self.nonlocal_view(self)
        if args or kwargs or view.strange() or view.few(x):
            return super().forward(x, *args, **kwargs)
        return view.forward(x)

    def set_backend(self, backend: str) -> None:
        """Use `backend` from now on; see `nonlocal_attention`."""
        check_choice(type(self).__name__, "backend", backend, BACKENDS)
        self.backend = backend

    def explain(self, x: torch.Tensor) -> Explanation:
        """Say which backend attends for an input like x; see `NonLocalBlock3d.explain`."""
        return self.nonlocal_view(self).explain(x)

    def attention_map(self, x: torch.Tensor, query: tuple[int, ...]) -> torch.Tensor:
        """Affinity of one position to all keys; see `NonLocalBlock3d.attention_map`."""
        return self.nonlocal_view(self).attention_map(x, query)

    def footprint(self, input_size: tuple[int, ...], *args: Any, **kwargs: Any) -> Footprint:
        """Memory of the attention for an input; see `NonLocalBlock3d.footprint`."""
        return self.nonlocal_view(self).footprint(input_size, *args, **kwargs)

    def extra_repr(self) -> str:
        view, own = self.nonlocal_view(self), super().extra_repr()
        pooled = "no pool" if view.pool is None else f"pool={view.pool_size} {view.pool_order}"
        ours = f"computed by nlkernels: {view.kind}, {pooled}, backend={self.backend or 'auto'}"
        return f"{own}, {ours}" if own else ours


class Extended(Exchanged):
    """A module whose output passes through a block, its child of the name that PLACE holds."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's, of the module's own."""
        block = self._modules[self.__dict__[PLACE]]
        return block(super().forward(*args, **kwargs))


def exchange(module: nn.Module, kind: type[Exchanged]) -> object:
    """Let a module be of the exchanged class of its own; the token is for `is_exchanged_by`."""
    made = exchanged_class(kind, type(module))
    if kind is Replaced:
        # Maps of another forward would be taken for those of the last one.
        stored = (name for name in made.nonlocal_view.stored if name in vars(module))
        vars(module).update(dict.fromkeys(stored))
    module.__class__ = made
    token = _last[module] = object()
    return token


def give_back(named: Mapping[str, nn.Module]) -> None:
    """Undo `exchange` for exchanged modules by their names: for all, or none.

    Raises:
        RuntimeError: a class derives from the exchanged one, as parametrizations and fully_shard
            make them; the module's own class would not have what that one keeps.
    """
    for name, module in named.items():
        if "nonlocal_original" not in vars(type(module)):
            raise RuntimeError(
                f"restore: expected {name or 'the model'} to be as it was exchanged, got a "
                f"{type(module).__name__}; undo what changed its class since"
            )
    for module in named.values():
        for name in (*_OPTIONS, PLACE):
            module.__dict__.pop(name, None)
        module.__class__ = module.nonlocal_original
        _last.pop(module, None)


def is_exchanged(module: nn.Module) -> bool:
    """Whether a module's class, or one it derives from, was exchanged."""
    return isinstance(module, Exchanged)


def is_exchanged_by(module: nn.Module, token: object) -> bool:
    """Whether a module's exchange is still the one that `exchange` returned this token for."""
    return is_exchanged(module) and _last.get(module) is token


@functools.cache
def exchanged_class(kind: type[Exchanged], own: type[nn.Module]) -> type[nn.Module]:
    """The class that takes the place of `own`, one for each."""
    from nlkernels.patching.systems import view_of

    members: dict[str, Any] = {
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "nonlocal_original": own,
    }
    if kind is Replaced:
        members["nonlocal_view"] = view_of(own)
    # The metaclass is that of the module's own class.
    return type(own)(own.__name__, (kind, own), members)


def _revive(kind: type[Exchanged], own: type[nn.Module]) -> nn.Module:
    made = exchanged_class(kind, own)
    return made.__new__(made)
