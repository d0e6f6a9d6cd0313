"""The channel gate of region-based non-local networks as a module."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from nlkernels import functional
from nlkernels._reading import check_prefix, read
from nlkernels._select import Explanation
from nlkernels._spec import BACKENDS, autocasts, check_choice, describe
from nlkernels.modules.layers import is_identity
from nlkernels.modules.options import check_batch_norm
from nlkernels.ops.gate.op import BACKENDS as OWN

# Ours -> theirs; 1x1x1 convolutions of theirs have three dimensions more.
_SYSTEMS = {"rnl": {"score": "W_k", "reduce": "W_v1", "norm": "bn1", "expand": "W_v2"}}
_COUNT = "norm.num_batches_tracked"


class ChannelGate(nn.Module):
    """Adds to every position what two layers make of one attended mean of all positions.

    z = x + expand(relu(norm(reduce(c)))) with c = sum_p softmax_p(score . x_p) x_p, broadcast over
    the positions: a global context block whose norm is a batch norm over the batch's contexts.

    Args:
        dim: channels C of input and output.
        reduction: the hidden layer has C // reduction channels.
        norm_eps: epsilon of the batch norm.
        norm_momentum: momentum of the batch norm; None averages over all steps.
        zero_init: start as the identity, with weight and bias of expand 0. They receive a gradient
            at the first step, and after it all others do.
        backend: as for `channel_gate`; None defers to NLKERNELS_BACKEND, then to "auto".

    Shape:
        (B, dim, *positions) with 1 to 3 axes of positions -> the same, any memory format.

    Memory:
        See `channel_gate`: a few numbers a position, besides the result.

    Raises:
        ValueError: unknown option; wrong rank or channels; no position; one item while the batch
            norm trains, which needs a batch.
        TypeError: input of another dtype.

    Example:
        >>> import torch, nlkernels
        >>> gate, x = nlkernels.ChannelGate(64), torch.randn(2, 64, 4, 14, 14)
        >>> torch.equal(gate(x), x)
        True

    Source:
        guoxih/region-based-non-local-network, ChannelGate; "GCNet" (Cao et al., 2019).
    """

    is_nonlocal = True

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 2,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.01,
        zero_init: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("reduction", reduction)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(
                    f"ChannelGate: expected {name} of 1 or more, got {number!r}; the published "
                    "gates have a reduction of 2"
                )
        if reduction > dim:
            raise ValueError(
                f"ChannelGate: expected reduction of at most dim={dim}, got {reduction}; the "
                "hidden layer needs a channel"
            )
        check_batch_norm("ChannelGate", norm_eps, norm_momentum)
        self.dim, self.reduction, self.backend = dim, reduction, None
        if backend is not None:
            self.set_backend(backend)
        self.score = nn.Linear(dim, 1)
        self.reduce = nn.Linear(dim, dim // reduction)
        self.norm = nn.BatchNorm1d(dim // reduction, eps=norm_eps, momentum=norm_momentum)
        self.expand = nn.Linear(dim // reduction, dim)
        if zero_init:
            nn.init.zeros_(self.expand.weight)
            nn.init.zeros_(self.expand.bias)

    @classmethod
    def from_foreign(
        cls, state_dict: Mapping[str, Any], preset: str = "rnl", *, prefix: str = "", **options: Any
    ) -> Self:
        """A new gate with the weights of another system's gate.

        Args:
            state_dict: that gate's arrays or tensors by its own keys.
            preset: the system: "rnl".
            prefix: what stands before the keys of this gate, "module.base_model.layer2.0.cg.".
            **options: of the constructor; dim and reduction are read off the weights.

        Returns:
            A gate in training mode that computes what theirs does, on the device of the tensors;
            each entry keeps its dtype and shares no memory with theirs.

        Raises:
            ValueError: unknown preset; keys are missing or left over; shapes do not fit, or are
                those of a hidden layer that no reduction gives.
            TypeError: a value that is no floating-point array; a key or a prefix that is no str.

        Example:
            >>> import nlkernels
            >>> theirs = nlkernels.ChannelGate(8).to_foreign("rnl", prefix="cg.")
            >>> nlkernels.ChannelGate.from_foreign(theirs, prefix="cg.").dim
            8
        """
        where = f"{cls.__name__}.from_foreign"
        check_choice(where, "preset", preset, tuple(_SYSTEMS))
        given = read(where, state_dict, prefix)
        keys = foreign_keys(preset)
        # Checkpoints of old releases of torch have no count.
        missing = [prefix + k for ours, k in keys.items() if k not in given and ours != _COUNT]
        unknown = sorted(prefix + key for key in given.keys() - set(keys.values()))
        if missing or unknown:
            raise ValueError(
                f"{where}: expected the keys of one {preset} gate behind {prefix!r}, got missing "
                f"{missing} and unknown {unknown}; pass the gate's prefix"
            )
        dim, reduction = _sizes(where, prefix + keys["reduce.weight"], given[keys["reduce.weight"]])
        # The values that a new gate draws are replaced: no random number of the caller's is spent.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            gate = cls(dim, **{"reduction": reduction, **options})
        state = gate.state_dict()
        state[_COUNT] = state[_COUNT].to(given[keys["reduce.weight"]].device)
        for name, ours in _theirs(state).items():
            value = given.get(keys[name], ours)
            if value.shape != ours.shape:
                raise ValueError(
                    f"{where}: expected {prefix}{keys[name]} of {tuple(ours.shape)}, got "
                    f"{describe(value)}; the weights are not those of one gate"
                )
            state[name] = value.view(state[name].shape)
        gate.load_state_dict(state, assign=True)
        return gate

    def to_foreign(self, preset: str = "rnl", *, prefix: str = "") -> dict[str, torch.Tensor]:
        """This gate's weights as another system's gate names and shapes them.

        Args:
            preset: the system: "rnl".
            prefix: put before every key.

        Returns:
            Copies of the weights, in that system's order.

        Raises:
            ValueError: unknown preset.
            TypeError: a prefix that is no str.

        Example:
            >>> import nlkernels
            >>> list(nlkernels.ChannelGate(8).to_foreign("rnl"))[:2]
            ['W_k.weight', 'W_k.bias']
        """
        where = f"{type(self).__name__}.to_foreign"
        check_choice(where, "preset", preset, tuple(_SYSTEMS))
        check_prefix(where, prefix)
        state = _theirs(self.state_dict())
        return {
            prefix + key: state[ours].detach().clone() for ours, key in foreign_keys(preset).items()
        }

    def set_backend(self, backend: str) -> None:
        """Use `backend` from now on; one that pools no context, as "sdpa", leaves it to "auto"."""
        check_choice("ChannelGate", "backend", backend, BACKENDS)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, *positions) -> the same."""
        self._check_input(x)
        weight, bias = self.score.weight.squeeze(0), self.score.bias
        return functional.channel_gate(
            x, weight, bias, transform=self._transform, backend=self._backend
        )

    def explain(self, x: torch.Tensor) -> Explanation:
        """Say which backend pools the context of an input like `x`, and why the others do not.

        Args:
            x: (B, dim, *positions).

        Raises:
            What `forward` raises.

        Example:
            >>> import torch, nlkernels
            >>> gate = nlkernels.ChannelGate(8, backend="chunked")
            >>> gate.explain(torch.zeros(2, 8, 4, 6, 6)).backend
            'chunked'
        """
        self._check_input(x)
        weight, bias = self.score.weight.detach().squeeze(0), self.score.bias.detach()
        return functional.explain("channel_gate", x, weight, bias, backend=self._backend)

    def extra_repr(self) -> str:
        line = f"{self.dim}, reduction={self.reduction}, backend={self.backend or 'auto'}"
        identity = is_identity(self.expand, None)
        return line if identity is None else f"{line}, output {'still' if identity else 'not'} zero"

    @property
    def _backend(self) -> str:
        return self.backend if self.backend in OWN else "auto"

    def _transform(self, context: torch.Tensor) -> torch.Tensor:
        return self.expand(F.relu(self.norm(self.reduce(context))))

    def _check_input(self, x: torch.Tensor) -> None:
        weight = self.score.weight
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"ChannelGate: expected a tensor, got {type(x).__name__}; convert it with "
                "torch.as_tensor"
            )
        if x.device != weight.device:
            raise ValueError(
                f"ChannelGate: expected input on {weight.device}, got {describe(x)}; move it or "
                "the gate with .to(device)"
            )
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(
                f"ChannelGate: expected input of {weight.dtype}, got {describe(x)}; cast it or "
                "the gate with .to(dtype), or use autocast"
            )
        if not 3 <= x.dim() <= 5 or x.shape[1] != self.dim or 0 in x.shape[2:]:
            raise ValueError(
                f"ChannelGate: expected (B, {self.dim}, positions) with 1 to 3 axes of positions, "
                f"got {describe(x)}; the gate is built for one number of channels"
            )
        # A synchronised norm, another class, counts the other processes' items as well.
        if x.shape[0] == 1 and isinstance(self.norm, nn.BatchNorm1d) and self.norm.training:
            raise ValueError(
                f"ChannelGate: expected more than one item while the batch norm trains, got "
                f"{describe(x)}; use larger batches, SyncBatchNorm, or gate.norm.eval()"
            )


def _theirs(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our entries in the shapes of other systems, whose score is a 1x1x1 convolution."""
    return {**state, "score.weight": state["score.weight"][..., None, None, None]}


def _sizes(where: str, key: str, weight: torch.Tensor) -> tuple[int, int]:
    """dim and reduction of the gate with this weight (hidden, dim) of `reduce`."""
    hidden, dim = weight.shape if weight.dim() == 2 else (0, 0)
    if not 0 < hidden <= dim or dim // (dim // hidden) != hidden:
        raise ValueError(
            f"{where}: expected {key} of (C // reduction, C) for a whole reduction, got "
            f"{describe(weight)}; such a gate has no counterpart here"
        )
    return dim, dim // hidden


def foreign_keys(preset: str) -> dict[str, str]:
    """Our entries -> a system's keys, in its order."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    keys = {}
    for ours, theirs in _SYSTEMS[preset].items():
        for name in ("weight", "bias", *(statistics if ours == "norm" else ())):
            keys[f"{ours}.{name}"] = f"{theirs}.{name}"
    return keys
