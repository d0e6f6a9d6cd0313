"""How a code base names and shapes the weights of a whole network.

An *entry* is a key of our model's `state_dict()`, such as "layer2.1.nl.theta.weight"; a *key* is
what another system calls it. Blocks follow `nlkernels._systems`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from nlkernels import _systems as blocks
from nlkernels._conversion import norm_form
from nlkernels._reading import read
from nlkernels.models.blocks import LocalBlock3d
from nlkernels.modules import ChannelGate
from nlkernels.modules.base import NonLocalBlock
from nlkernels.modules.gate import foreign_keys
from nlkernels.modules.layers import Affine

_NORMS = (nn.modules.batchnorm._BatchNorm, Affine)
_LAYERS = (nn.Conv3d, nn.Linear, *_NORMS)


class _Absent(Exception):
    """The system has no such module."""


class Pair(NamedTuple):
    """An entry of ours beside a key of theirs.

    Attributes:
        entry: ours; the mask of a region's weight stands beside the entry of that weight.
        key: theirs, without prefix.
        shape: theirs.
        part: "plain", or "region" and "mask" for the two keys of a region's weight.
    """

    entry: str
    key: str
    shape: tuple[int, ...]
    part: str = "plain"


def _nowhere(model: nn.Module, path: str) -> None:
    """The prefix of blocks, or gates, in a system without them."""


@dataclass(frozen=True)
class Layout:
    """One system's key layout.

    Attributes:
        name: the system.
        module: (model, path of a module of ours outside of blocks) -> their name of it; None for a
            network that the system does not have.
        block_prefix: (model, path of the layer that a block follows) -> what stands in front of the
            keys of the block, separator included; None where the system has no such block.
        preset: whose blocks they are, a key of `nlkernels.state_dict.SYSTEMS`; None for none.
        gate_prefix: the same of the gate.
        anchors: keys that every checkpoint has; all of them make the system certain.
        marks: parts of names, one of which must occur for certainty.
        counter_marks: parts of names that must not occur.
        certainty: of the names alone.
        separator: between module and parameter.
        weight: name of a layer's weight; its bias is `bias`.
        bias: name of a layer's bias.
        counts: whether batch norms count their batches.
        ignored: keys that are no weights: names, endings that start with "_", and beginnings that
            end with ".".
        flat: convolutions of single frames have two dimensions.
        classifier_dims: dimensions of the classifier's weight.
        inflates: convolutions of images are accepted for those of clips.
    """

    name: str
    module: Callable[[nn.Module, str], str | None]
    anchors: tuple[str, ...]
    block_prefix: Callable[[nn.Module, str], str | None] = _nowhere
    preset: str | None = None
    gate_prefix: Callable[[nn.Module, str], str | None] = _nowhere
    marks: tuple[str, ...] = ()
    counter_marks: tuple[str, ...] = ()
    certainty: float = 1.0
    separator: str = "."
    weight: str = "weight"
    bias: str = "bias"
    counts: bool = True
    ignored: tuple[str, ...] = ()
    flat: bool = False
    classifier_dims: int = 2
    inflates: bool = False

    def prefix(self, keys: Collection[str]) -> str | None:
        """What stands before all keys, such as "module."; None if an anchor is missing."""
        anchor = self.anchors[0]
        ends = [key for key in keys if key == anchor or key.endswith("." + anchor)]
        prefix = min(ends, key=len, default=None)
        if prefix is None:
            return None
        prefix = prefix.removesuffix(anchor)
        return prefix if all(prefix + each in keys for each in self.anchors) else None

    def detect(self, keys: Collection[str]) -> float:
        """How sure one can be that keys are of this system, from 0 to 1."""
        keys = set(keys)
        if self.prefix(keys) is None:
            return 0.0
        if any(mark in key for key in keys for mark in self.counter_marks):
            return 0.0
        marked = not self.marks or any(mark in key for key in keys for mark in self.marks)
        return self.certainty if marked else self.certainty / 2

    def strip(self, state: Mapping[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
        """The prefix of a state dict, and its weights as tensors by key without it."""
        names = [key for key in state if isinstance(key, str)]
        prefix = self.prefix(set(names)) or ""
        kept = {key: state[key] for key in names if not self.is_ignored(key)}
        return prefix, read(f"load_foreign({self.name!r})", kept, prefix)

    def is_ignored(self, key: str) -> bool:
        """Whether a key is of no weight, such as an optimiser's momentum."""
        return any(
            key == name
            or (name[0] == "_" and key.endswith(name))
            or (name[-1] == "." and key.startswith(name))
            for name in self.ignored
        )

    def pairs(self, model: nn.Module, *, partial: bool = False) -> list[Pair]:
        """All entries of a model beside their keys.

        Args:
            model: a model of ours.
            partial: leave out what the system does not have instead of refusing the network.

        Raises:
            ValueError: the system has no such network.
        """
        found: list[Pair] = []
        for path, module in model.named_modules():
            try:
                found += self._module_pairs(model, path, module)
            except _Absent as absent:
                if not partial:
                    raise self._refused(model, str(absent)) from None
        covered = {pair.entry for pair in found}
        left = [entry for entry in model.state_dict() if entry not in covered]
        left = [entry for entry in left if not entry.endswith(blocks.COUNT_KEY)]
        if left and not partial:
            raise self._refused(model, f"nothing that could be called {left[0]}")
        return found

    def _module_pairs(self, model: nn.Module, path: str, module: nn.Module) -> list[Pair]:
        if isinstance(module, NonLocalBlock):
            return self._block(model, path, module)
        if isinstance(module, LocalBlock3d):
            raise _Absent(f"a local block at {path}")
        if isinstance(module, ChannelGate):
            return self._gate(model, path, module)
        if isinstance(module, _LAYERS) and not inside_block(model, path):
            return self._layer(model, path, module)
        return []

    def _layer(self, model: nn.Module, path: str, module: nn.Module) -> list[Pair]:
        theirs = self.module(model, path)
        if theirs is None:
            raise _Absent(f"no counterpart of {path}")
        pairs = []
        for name, tensor in module.state_dict().items():
            named = self._parameter(module, name)
            if named is not None:
                key = theirs + self.separator + named
                pairs.append(Pair(f"{path}.{name}", key, self._shape(module, tensor)))
        return pairs

    def _parameter(self, module: nn.Module, name: str) -> str | None:
        if name == blocks.COUNT_KEY:
            return name if self.counts else None
        if isinstance(module, _NORMS):
            # Networks name their norms as their blocks do.
            names = {} if self.preset is None else blocks.SYSTEMS[self.preset].norm_names
            return names.get(name, name)
        return {"weight": self.weight, "bias": self.bias}[name]

    def _shape(self, module: nn.Module, tensor: torch.Tensor) -> tuple[int, ...]:
        shape = tuple(tensor.shape)
        if isinstance(module, nn.Linear) and len(shape) == 2:
            return shape + (1,) * (self.classifier_dims - 2)
        if self.flat and len(shape) == 5 and shape[2] == 1:
            return (*shape[:2], *shape[3:])
        return shape

    def _block(self, model: nn.Module, path: str, block: NonLocalBlock) -> list[Pair]:
        prefix = self.block_prefix(model, path.rpartition(".")[0])
        if prefix is None or self.preset is None:
            raise _Absent(f"no block at {path}")
        system = blocks.SYSTEMS[self.preset]
        norm = norm_form(block.norm)
        if block.kind not in system.kinds:
            raise _Absent(f"no block of kind {block.kind!r}, as at {path}")
        name = blocks.norm_abbreviation(block.norm) if norm == blocks.MODULE else "bn"
        form = blocks.Form(block.dims, block.pool_size is not None, norm, name)
        pairs = []
        for entry, tensor in block.state_dict().items():
            key = system.key(entry, form)
            shape, part = tuple(tensor.shape), "plain"
            if entry == "concat_weight":
                shape = (1, tensor.numel(), 1, 1)
            elif entry == "region.weight":
                width = blocks.group_width(shape[0])
                shape, part = (shape[0], width, *shape[1:]), "region"
                pairs.append(Pair(f"{path}.{entry}", prefix + blocks.MASK_KEY, shape, "mask"))
            if key is not None:
                pairs.append(Pair(f"{path}.{entry}", prefix + key, shape, part))
        return pairs

    def _gate(self, model: nn.Module, path: str, gate: ChannelGate) -> list[Pair]:
        prefix = self.gate_prefix(model, path.rpartition(".")[0])
        if prefix is None:
            raise _Absent(f"no gate at {path}")
        entries = gate.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in entries.items()}
        shapes["score.weight"] = (*shapes["score.weight"], 1, 1, 1)
        keys = foreign_keys("rnl")
        return [Pair(f"{path}.{name}", prefix + keys[name], shapes[name]) for name in entries]

    def _refused(self, model: nn.Module, reason: str) -> ValueError:
        name = getattr(model, "name", type(model).__name__)
        return ValueError(
            f"{self.name}: expected a network that this system has, got {name}: there is {reason}; "
            "choose the system whose network it is, model.design.system, or another model"
        )

    def to_ours(self, model: nn.Module, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Entries of a model that a state dict holds, by our names and in our shapes.

        Args:
            model: a model of ours.
            state: arrays or tensors by this system's keys, with any prefix before all of them.

        Returns:
            Copies of the entries whose key is there; keys that fit nothing are left out.

        Raises:
            ValueError: a shape that does not fit; a network that the system does not have.
            TypeError: a value that is no array of floating-point numbers.
        """
        _, given = self.strip(state)
        ours = model.state_dict()
        return {
            pair.entry: native(pair, given[pair.key], ours[pair.entry])
            for pair in self.pairs(model)
            if pair.key in given and pair.part != "mask"
        }

    def from_ours(
        self,
        model: nn.Module,
        state: Mapping[str, torch.Tensor],
        converted: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({}),
    ) -> dict[str, torch.Tensor]:
        """A model's entries under this system's keys and in its shapes, as copies.

        Args:
            model: the model that the entries are of.
            state: its `state_dict()`.
            converted: keys and values of blocks that were converted already, by their paths.

        Raises:
            ValueError: the system has no such network.
        """
        exported: dict[str, torch.Tensor] = {}
        for pair in self.pairs(model):
            block = next((path for path in converted if pair.entry.startswith(f"{path}.")), None)
            if block is None:
                exported[pair.key] = foreign(pair, state[pair.entry].detach())
            else:
                exported |= converted[block]
        return exported


def native(pair: Pair, tensor: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """A key's values as the entry has them.

    Raises:
        ValueError: they have another shape, axes of size 1 apart.
    """
    if not fits(pair, tensor, ours):
        raise ValueError(
            f"{pair.key}: expected shape {pair.shape}, got {tuple(tensor.shape)}; "
            "the weights are those of another network"
        )
    if pair.part == "region":
        tensor = blocks.depthwise_from_dense(tensor)
    return tensor.reshape(ours.shape)


def fits(pair: Pair, tensor: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether values have the shape of a key, or that of its entry with other axes of size 1."""
    if tuple(tensor.shape) == pair.shape:
        return True
    return pair.part == "plain" and _essential(tensor.shape) == _essential(ours.shape)


def inflated(tensor: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | None:
    """A convolution of images repeated over the frames of one for clips; None if it is none.

    On a clip of equal frames it computes what it does on the image.
    """
    shape, flat = tuple(ours.shape), (*tensor.shape[:2], *tensor.shape[-2:])
    if len(shape) != 5 or tensor.dim() not in (4, 5) or shape[:2] + shape[3:] != flat:
        return None
    if tensor.numel() != math.prod(flat) or shape[2] == 1:
        return None
    return (tensor.reshape(*flat[:2], 1, *flat[2:]) / shape[2]).expand(shape).contiguous()


def foreign(pair: Pair, tensor: torch.Tensor) -> torch.Tensor:
    """An entry's values as a key has them, in memory of their own."""
    if pair.part == "mask":
        return blocks.dense_mask(tensor.shape[0], tuple(tensor.shape[1:])).to(tensor)
    if pair.part == "region":
        return blocks.dense_from_depthwise(tensor)
    return tensor.clone(memory_format=torch.contiguous_format).view(pair.shape)


def _essential(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


def inside_block(model: nn.Module, path: str) -> bool:
    """Whether a module belongs to a block or a gate."""
    parents = path.split(".")
    ancestors = (model.get_submodule(".".join(parents[:end])) for end in range(1, len(parents)))
    return any(isinstance(each, NonLocalBlock | LocalBlock3d | ChannelGate) for each in ancestors)
