"""Non-local blocks as modules."""

import math

import torch
from torch import nn

from nlkernels._select import Explanation
from nlkernels._spec import BACKENDS, KINDS, autocasts, check_choice, default_scale, describe
from nlkernels.functional import explain, nonlocal_attention

POOL_ORDERS = ("before", "after")
NORMS = ("batch", None)
ZERO_INITS = ("gamma", "weight", None)
INITS = ("normal", "kaiming", "default")


class NonLocalBlock3d(nn.Module):
    """Non-local block for video features: every position attends to all positions of all frames.

    z = x + norm(out(attention(theta(x), phi(x'), g(x')))), x' being x pooled ("before"); or with
    phi and g pooled after their projection ("after"). Positions are flattened in (T, H, W) order.
    Kind "gaussian" has no theta and phi: query is x and key is pooled x, of `dim` channels.

    Args:
        dim: channels of the input and the output.
        inner: channels of the projections; None is dim // 2.
        kind: affinity: "softmax", "gaussian" or "dot_product".
        pool: kernel and stride (t, h, w) of the max pooling of keys and values; None for none.
        pool_order: "before" or "after" the projections; two different functions of equal weights.
        scale: factor of the scores; None is inner**-0.5 for softmax and 1 for the other kinds.
        qkv_bias: biases of theta, phi and g.
        out_bias: bias of out.
        norm: "batch" for a batch norm after out, or None.
        norm_eps: epsilon of the batch norm.
        zero_init: what makes a new block the identity: "gamma" (the norm's weight is 0), "weight"
            (weight and bias of out are 0), or None for a block that changes its input from the
            start. A zero still receives a gradient at the first step, and after it all others do.
        init: weights of the projections: "normal" (std 0.01, biases 0), "kaiming" (normal,
            fan out, biases 0) or "default" (torch's).
        temporal_group: frames of a group that attends to itself only; None for all frames. T must
            be a multiple of it, or smaller.
        backend: as for `nonlocal_attention`; None defers to NLKERNELS_BACKEND, then to "auto".

    Shape:
        (B, dim, T, H, W) -> the same, any memory format.

    Memory:
        The scores are never stored whole, unless the backend is "reference"; see
        `nonlocal_attention`.

    Raises:
        ValueError: unknown option; wrong rank or channels; clip smaller than the pool; T no
            multiple of `temporal_group`.

    Example:
        >>> import torch, nlkernels
        >>> block = nlkernels.NonLocalBlock3d(64)
        >>> x = torch.randn(2, 64, 4, 14, 14)
        >>> torch.equal(block(x), x)
        True

    Source:
        "Non-local Neural Networks" (CVPR 2018), figure 2; facebookresearch/video-nonlocal-net.
    """

    def __init__(
        self,
        dim: int,
        *,
        inner: int | None = None,
        kind: str = "softmax",
        pool: tuple[int, int, int] | None = (1, 2, 2),
        pool_order: str = "before",
        scale: float | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        norm: str | None = "batch",
        norm_eps: float = 1e-5,
        zero_init: str | None = "gamma",
        init: str = "normal",
        temporal_group: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if inner is None:
            inner = max(dim // 2, 1) if isinstance(dim, int) else 1
        self._check_options(dim, inner, kind, pool, pool_order, norm, zero_init, init)
        self._check_numbers(temporal_group, scale, norm_eps)
        self.dim, self.inner, self.kind, self.pool_order = dim, inner, kind, pool_order
        self.scale, self.temporal_group, self.backend = scale, temporal_group, None
        self.pool_size = None if pool is None else tuple(pool)
        if backend is not None:
            self.set_backend(backend)
        if kind != "gaussian":
            self.theta = nn.Conv3d(dim, inner, 1, bias=qkv_bias)
            self.phi = nn.Conv3d(dim, inner, 1, bias=qkv_bias)
        self.g = nn.Conv3d(dim, inner, 1, bias=qkv_bias)
        self.out = nn.Conv3d(inner, dim, 1, bias=out_bias)
        self.norm = nn.BatchNorm3d(dim, eps=norm_eps) if norm == "batch" else None
        self.pool = None if pool is None else nn.MaxPool3d(self.pool_size)
        self._initialise(init, zero_init)

    def set_backend(self, backend: str) -> None:
        """Use `backend` from now on; see `nonlocal_attention`."""
        check_choice("NonLocalBlock3d", "backend", backend, BACKENDS)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, dim, T, H, W) -> the same."""
        self._check_input(x)
        folded = self._fold(x)
        if folded is x:
            return self._block(x)
        out = self._block(folded).unflatten(0, (x.shape[0], -1))
        return out.transpose(1, 2).flatten(2, 3).contiguous(memory_format=_memory_format(x))

    def attention_map(self, x: torch.Tensor, query: tuple[int, int, int]) -> torch.Tensor:
        """Affinity of one query position to every key position, one row of the matrix.

        Args:
            x: (B, dim, T, H, W).
            query: (t, y, x) position in x.

        Returns:
            (B, T', H', W') in the key grid, after pooling, and within the query's temporal group.
            For softmax and gaussian it sums to 1 for each item of the batch.

        Raises:
            ValueError: wrong input, or a position outside of it.

        Memory:
            One projection of x and O(T' H' W') scores; never the whole matrix.

        Example:
            >>> import torch, nlkernels
            >>> block = nlkernels.NonLocalBlock3d(8)
            >>> block.attention_map(torch.randn(1, 8, 4, 6, 6), query=(0, 2, 3)).shape
            torch.Size([1, 4, 3, 3])
        """
        self._check_input(x)
        inside = isinstance(query, tuple | list) and len(query) == 3
        inside = inside and all(isinstance(q, int) for q in query)
        if not inside or not all(0 <= q < n for q, n in zip(query, x.shape[2:], strict=True)):
            raise ValueError(
                f"attention_map: expected query (t, y, x) inside {tuple(x.shape[2:])}, got "
                f"{query}; positions count from 0 in the block's input"
            )
        t, h, w = query
        point = x[:, :, t : t + 1, h : h + 1, w : w + 1]
        if self.temporal_group is not None:
            start = t // self.temporal_group * self.temporal_group
            x = x[:, :, start : start + self.temporal_group]
        row = point if self.kind == "gaussian" else self.theta(point)
        keys = self._keys(self._pooled(x, "before"))
        scale = default_scale(self.kind, self.inner) if self.scale is None else self.scale
        # In float32: a float16 score may exceed its range while the affinity does not.
        wide = torch.promote_types(keys.dtype, torch.float32)
        row, columns = row.flatten(2).to(wide), keys.flatten(2).to(wide)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.bmm(row.mT, columns).squeeze(1) * scale
        if self.kind == "dot_product":
            affinity = scores / scores.shape[1]
        else:
            affinity = torch.softmax(scores, dim=-1)
        return affinity.to(keys.dtype).unflatten(1, keys.shape[2:])

    def explain(self, x: torch.Tensor) -> Explanation:
        """Say which backend attends for an input like `x`, and why the others do not.

        Args:
            x: (B, dim, T, H, W).

        Returns:
            An `Explanation`, of one group's attention where `temporal_group` is set.

        Raises:
            What `forward` raises.

        Example:
            >>> import torch, nlkernels
            >>> block = nlkernels.NonLocalBlock3d(64, kind="dot_product")
            >>> block.explain(torch.zeros(2, 64, 4, 14, 14)).backend
            'chunked'
        """
        self._check_input(x)
        with torch.no_grad():
            return explain("nonlocal_attention", *self._rows(self._fold(x)), **self._options())

    def extra_repr(self) -> str:
        pooled = f"pool={self.pool_size} {self.pool_order}" if self.pool_size else "no pool"
        group = f", temporal_group={self.temporal_group}" if self.temporal_group else ""
        return (
            f"{self.dim}, inner={self.inner}, kind={self.kind}, {pooled}{group}, "
            f"backend={self.backend if self.backend else 'auto'}"
        )

    def _fold(self, x: torch.Tensor) -> torch.Tensor:
        """Groups of frames as items of the batch: (B T/t, C, t, H, W)."""
        group = self.temporal_group
        if group is None or group >= x.shape[2]:
            return x
        return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)

    def _block(self, x: torch.Tensor) -> torch.Tensor:
        rows = nonlocal_attention(*self._rows(x), **self._options())
        attended = rows.mT.unflatten(2, x.shape[2:])
        out = self.out(attended.contiguous(memory_format=_memory_format(x)))
        return x + (out if self.norm is None else self.norm(out))

    def _rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Operands (B,N,D), (B,M,D), (B,M,V) of the attention, views of the projections."""
        query = x if self.kind == "gaussian" else self.theta(x)
        source = self._pooled(x, "before")
        operands = (query, self._keys(source), self._pooled(self.g(source), "after"))
        return tuple(t.flatten(2).mT for t in operands)

    def _options(self) -> dict[str, object]:
        backend = "auto" if self.backend is None else self.backend
        return {"kind": self.kind, "scale": self.scale, "backend": backend}

    def _keys(self, source: torch.Tensor) -> torch.Tensor:
        return self._pooled(source if self.kind == "gaussian" else self.phi(source), "after")

    def _pooled(self, features: torch.Tensor, order: str) -> torch.Tensor:
        """The features, pooled if this block pools at this point."""
        pools = self.pool is not None and self.pool_order == order
        return self.pool(features) if pools else features

    def _check_input(self, x: torch.Tensor) -> None:
        weight = self.g.weight
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"NonLocalBlock3d: expected a tensor, got {type(x).__name__}; "
                "convert it with torch.as_tensor"
            )
        if x.device != weight.device:
            raise ValueError(
                f"NonLocalBlock3d: expected input on {weight.device}, got {describe(x)}; "
                "move it or the block with .to(device)"
            )
        if x.dtype != weight.dtype and not autocasts(x.device.type):
            raise TypeError(
                f"NonLocalBlock3d: expected input of {weight.dtype}, got {describe(x)}; "
                "cast it or the block with .to(dtype), or use autocast"
            )
        if x.dim() != 5 or x.shape[1] != self.dim or 0 in x.shape[2:]:
            raise ValueError(
                f"NonLocalBlock3d: expected (B, {self.dim}, T, H, W), got {describe(x)}; "
                "the block is built for one number of channels, and a clip needs its own time axis"
            )
        if self.pool_size and any(n < p for n, p in zip(x.shape[2:], self.pool_size, strict=True)):
            raise ValueError(
                f"NonLocalBlock3d: expected a clip of at least {self.pool_size} to pool, got "
                f"{tuple(x.shape[2:])}; use pool=None or larger clips"
            )
        group = self.temporal_group
        if group is not None and x.shape[2] > group and x.shape[2] % group:
            raise ValueError(
                f"NonLocalBlock3d: expected T to be a multiple of temporal_group={group}, got "
                f"T={x.shape[2]}; choose another group or clip length"
            )

    @staticmethod
    def _check_numbers(temporal_group: object, scale: object, norm_eps: object) -> None:
        for name, number in (("scale", scale), ("norm_eps", norm_eps)):
            number = 0.0 if number is None else number
            if not isinstance(number, int | float) or not -math.inf < number < math.inf:
                raise ValueError(
                    f"NonLocalBlock3d: expected {name} to be a finite number, got {number!r}; "
                    "leave it out for the default"
                )
        if temporal_group is not None and (
            not isinstance(temporal_group, int) or temporal_group < 1
        ):
            raise ValueError(
                "NonLocalBlock3d: expected temporal_group to be a positive number of frames, "
                f"got {temporal_group!r}; None attends to all frames"
            )

    @staticmethod
    def _check_options(dim, inner, kind, pool, pool_order, norm, zero_init, init) -> None:
        where = "NonLocalBlock3d"
        for name, number in (("dim", dim), ("inner", inner)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(
                    f"{where}: expected {name} of 1 or more, got {number!r}; pass channels"
                )
        check_choice(where, "kind", kind, KINDS)
        check_choice(where, "pool_order", pool_order, POOL_ORDERS)
        for name, value, choices in (
            ("norm", norm, NORMS),
            ("zero_init", zero_init, ZERO_INITS),
        ):
            if value is not None:
                check_choice(where, name, value, choices[:-1])
        check_choice(where, "init", init, INITS)
        if pool is not None and not (
            isinstance(pool, tuple | list)
            and len(pool) == 3
            and all(isinstance(p, int) and p >= 1 for p in pool)
        ):
            raise ValueError(
                f"{where}: expected pool to be three positive sizes (t, h, w) or None, got "
                f"{pool!r}; the published blocks use (1, 2, 2)"
            )
        if zero_init == "gamma" and norm is None:
            raise ValueError(
                f"{where}: expected a norm for zero_init='gamma', got norm=None; "
                "use zero_init='weight'"
            )

    def _initialise(self, init: str, zero_init: str | None) -> None:
        for projection in self.children():
            if not isinstance(projection, nn.Conv3d) or init == "default":
                continue
            if init == "normal":
                nn.init.normal_(projection.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(projection.weight, mode="fan_out", nonlinearity="relu")
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if zero_init == "gamma":
            nn.init.zeros_(self.norm.weight)
        elif zero_init == "weight":
            nn.init.zeros_(self.out.weight)
            if self.out.bias is not None:
                nn.init.zeros_(self.out.bias)


def set_nonlocal_backend(model: nn.Module, backend: str) -> int:
    """Switch every non-local block of a model to one backend.

    Args:
        model: any module that contains non-local blocks, or is one.
        backend: as for `nonlocal_attention`.

    Returns:
        How many blocks were switched.

    Raises:
        ValueError: unknown backend, or a model without a block.

    Example:
        >>> import nlkernels
        >>> nlkernels.set_nonlocal_backend(nlkernels.NonLocalBlock3d(64), "chunked")
        1
    """
    check_choice("set_nonlocal_backend", "backend", backend, BACKENDS)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_nonlocal_backend: expected a module, got {type(model).__name__}; "
            "pass the model whose blocks are to be switched"
        )
    blocks = [m for m in model.modules() if isinstance(m, NonLocalBlock3d)]
    if not blocks:
        raise ValueError(
            "set_nonlocal_backend: expected a model with non-local blocks, got "
            f"{type(model).__name__} without any; build it with blocks"
        )
    for block in blocks:
        block.set_backend(backend)
    return len(blocks)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.contiguous_format
    return torch.channels_last_3d
