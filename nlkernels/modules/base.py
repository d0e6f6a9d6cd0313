"""What the non-local blocks of all dimensions do."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from nlkernels import functional
from nlkernels._select import Explanation
from nlkernels._spec import BACKENDS, check_choice
from nlkernels.modules import choice, fast, inputs, layers, maps, plain, printed
from nlkernels.modules.affinity import affinity, block_diagonal
from nlkernels.modules.footprint import Footprint, footprint
from nlkernels.modules.options import BlockOptions, Norm, complete, factor
from nlkernels.modules.presets import preset_options

# The operation's kind for a block's.
_ATTENTION = {"region_softmax": "softmax", "region_relu": "relu"}
# Projections of the kinds that do not have all three: a region's key and value are its query's.
_PROJECTIONS = {"gaussian": ("g",), "region_softmax": ("theta",), "region_relu": ("theta",)}


class NonLocalBlock(nn.Module):
    """What `NonLocalBlock1d`, `NonLocalBlock2d` and `NonLocalBlock3d` share; see the last."""

    dims: int
    is_nonlocal = True
    # True computes it in few passes, False layer after layer; None as is faster, by `choice`.
    fused: bool | None = None
    # True computes the attention's operands again in the backward, where x is kept, too.
    recompute = False

    def __init__(
        self,
        dim: int,
        *,
        inner: int | None = None,
        kind: str = "softmax",
        pool: tuple[int, ...] | str | None = "default",
        pool_order: str | None = None,
        scale: float | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        norm: Norm = "batch",
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        zero_init: str | None = "gamma",
        init: str | float = "normal",
        out_init: str | float | None = None,
        temporal_group: int | None = None,
        region_kernel: tuple[int, ...] | None = None,
        region_l2norm: bool = False,
        input_size: tuple[int, ...] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        given = BlockOptions(
            inner=inner,
            kind=kind,
            pool=pool,
            pool_order=pool_order,
            scale=scale,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            norm=norm,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            zero_init=zero_init,
            init=init,
            out_init=out_init,
            temporal_group=temporal_group,
            region_kernel=region_kernel,
            region_l2norm=region_l2norm,
            input_size=input_size,
            backend=backend,
        )
        options = complete(self._name, self.dims, dim, given)
        self.dim, self.inner, self.kind = dim, options.inner, kind
        self.pool_size, self.pool_order = options.pool, options.pool_order
        self.scale, self.temporal_group = scale, temporal_group
        self.region_kernel, self.region_l2norm = options.region_kernel, region_l2norm
        self.input_size = None if input_size is None else tuple(input_size)
        self.backend = None
        if backend is not None:
            self.set_backend(backend)
        if input_size is not None:
            inputs.check_positions(self, self._name, self.input_size[-self.dims :])
        self._build(options)

    @classmethod
    def from_preset(cls, name: str, dim: int, **overrides: Any) -> Self:
        """A new block with the options of a published system.

        Two systems' stages differ: pass temporal_group=4 for caffe2_affine in res3 (and nowhere
        else), and region_kernel=(3, 3, 3) for rnl in res4.

        Args:
            name: a key of `nlkernels.modules.presets.PRESETS`.
            dim: channels of the input and the output.
            **overrides: options that replace the preset's.

        Returns:
            A block, initialised as that system initialises its own.

        Raises:
            ValueError: unknown preset, or what the constructor raises.
            TypeError: unknown option.

        Example:
            >>> import nlkernels
            >>> block = nlkernels.NonLocalBlock3d.from_preset("tsm", 512)
            >>> block.pool_order, block.scale
            ('after', 1.0)
        """
        return cls(dim, **preset_options(name, cls.dims, overrides))

    @classmethod
    def from_foreign(
        cls, state_dict: Mapping[str, Any], preset: str, *, prefix: str = "", **options: Any
    ) -> Self:
        """A new block with the weights of another system's block.

        Args:
            state_dict: that block's arrays or tensors by its own keys.
            preset: the system, by the name of its preset.
            prefix: what stands before the keys of this block.
            **options: options that the keys do not show and that differ from the preset's.

        Returns:
            A block in training mode that computes what theirs does.

        Raises:
            ValueError, TypeError: see `nlkernels.state_dict.import_block`.

        Example:
            >>> import nlkernels
            >>> theirs = nlkernels.NonLocalBlock3d.from_preset("slowfast", 8).to_foreign("slowfast")
            >>> nlkernels.NonLocalBlock3d.from_foreign(theirs, "slowfast").dim
            8
        """
        from nlkernels import state_dict as foreign

        return foreign.import_block(cls, state_dict, preset, prefix=prefix, **options)

    def to_foreign(
        self, preset: str, *, prefix: str = "", **options: Any
    ) -> dict[str, torch.Tensor]:
        """This block's weights as another system's block names and shapes them.

        Args:
            preset: the system, by the name of its preset.
            prefix: put before every key.
            **options: options of that system's block that differ from the preset's.

        Returns:
            Copies of the weights. In evaluation mode a block of that system computes the same.

        Raises:
            ValueError, TypeError: see `nlkernels.state_dict.export_block`.

        Example:
            >>> import nlkernels
            >>> sorted(nlkernels.NonLocalBlock3d(8).to_foreign("slowfast"))[0]
            'bn.bias'
        """
        from nlkernels import state_dict as foreign

        return foreign.export_block(self, preset, prefix=prefix, **options)

    def footprint(
        self,
        input_size: tuple[int, ...],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        training: bool = True,
    ) -> Footprint:
        """Memory of the attention for an input, and of the naive form; printed as one line.

        Args:
            input_size: (B, dim, *positions), or the positions alone for B = 1.
            dtype: of the attention, as under autocast; None is that of the weights.
            device: where it would run; None is that of the weights.
            training: include the backward.

        Returns:
            A `nlkernels.modules.footprint.Footprint`. It is reckoned: nothing runs.

        Raises:
            ValueError, TypeError: see `nlkernels.modules.footprint.footprint`.

        Example:
            >>> import nlkernels
            >>> block = nlkernels.NonLocalBlock3d(64, backend="chunked")
            >>> block.footprint((4, 14, 14), training=False).keys
            196
        """
        return footprint(self, input_size, dtype, device, training)

    def set_backend(self, backend: str) -> None:
        """Use `backend` from now on; see `nonlocal_attention`."""
        check_choice(self._name, "backend", backend, BACKENDS)
        self.backend = backend

    def forward(
        self, x: torch.Tensor, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, dim, *positions) -> the same.

        With `return_map` also the whole normalised affinity (B, N, M), in at least float32: it
        materialises what the block otherwise avoids. Keys of other temporal groups have 0.
        """
        inputs.check(self, x)
        out, rows = (plain if self._apart(x) else fast).forward(self, x)
        if not return_map:
            return out
        weights = affinity(self.kind, rows[0], rows[1], self._factor)
        return out, block_diagonal(weights, x.shape[0])

    def attention_map(self, x: torch.Tensor, query: tuple[int, ...]) -> torch.Tensor:
        """Affinity of one query position to every key position, one row of the matrix.

        Args:
            x: (B, dim, *positions).
            query: position in x, such as (t, y, x), of integers of any library.

        Returns:
            (B, *key positions), after pooling and within the query's temporal group, in at least
            float32. For the softmax kinds it sums to 1 for each item of the batch.

        Raises:
            ValueError: wrong input, or a position outside of it.

        Memory:
            The projections of x for keys and O(M) scores; never the whole matrix.

        Example:
            >>> import torch, nlkernels
            >>> block = nlkernels.NonLocalBlock3d(8)
            >>> block.attention_map(torch.randn(1, 8, 4, 6, 6), query=(0, 2, 3)).shape
            torch.Size([1, 4, 3, 3])
        """
        inputs.check(self, x)
        return maps.row(self, x, inputs.position(query, x))

    def explain(self, x: torch.Tensor) -> Explanation:
        """Say which backend attends for an input like `x`, and why the others do not.

        Args:
            x: (B, dim, *positions).

        Returns:
            An `Explanation`, of one group's attention where `temporal_group` is set. Its `problem`
            also names the backend that aggregates regions, and says why the layers run one after
            another where they do.

        Raises:
            What `forward` raises.

        Example:
            >>> import torch, nlkernels
            >>> block = nlkernels.NonLocalBlock3d(64, kind="dot_product")
            >>> block.explain(torch.zeros(2, 64, 4, 14, 14)).backend
            'chunked'
        """
        inputs.check(self, x)
        apart = self._apart(x)
        with torch.no_grad():
            rows = self._operands(x, bool(apart))
        if self.kind == "concat":
            found = functional.explain("nonlocal_concat", *rows, backend=self._backend)
        else:
            found = functional.explain("nonlocal_attention", *rows, **self._options())
        parts = [found.problem]
        if self.region is not None:
            # x in the projections' channels stands for theta's map.
            like = x[:, :1].expand(-1, self.inner, *x.shape[2:]).to(rows[2].dtype)
            regions = self.region.explain(like, layers.region_backend(self.backend))
            parts.append(f"{regions.backend} aggregates regions")
        if apart:
            parts.append(f"its layers run one after another, as {', '.join(apart)}")
        return found._replace(problem="; ".join(parts))

    def extra_repr(self) -> str:
        return printed.line(self)

    def _apart(self, x: torch.Tensor) -> list[str]:
        """Why the layers run one after another for an input; an empty list where they do not."""
        found = self._obstacles()
        small = "" if found else choice.small(self, x)
        return [small] if small else found

    def _obstacles(self) -> list[str]:
        """Why the layers run one after another for every input."""
        return fast.obstacles(self)

    def _operands(self, x: torch.Tensor, apart: bool) -> tuple[torch.Tensor, ...]:
        """Operands of the attention, as one of the two ways lays them out."""
        return (plain if apart else fast).operands(self, x)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _backend(self) -> str:
        return "auto" if self.backend is None else self.backend

    @property
    def _factor(self) -> float:
        return factor(self.kind, self.scale, self.inner)

    def _options(self) -> dict[str, Any]:
        kind = _ATTENTION.get(self.kind, self.kind)
        return {"kind": kind, "scale": self._factor, "backend": self._backend}

    def _build(self, options: BlockOptions) -> None:
        convolution = layers.CONVOLUTIONS[self.dims]
        norm = layers.norm(self._name, self.dims, self.dim, options)
        projections = _PROJECTIONS.get(self.kind, ("theta", "phi", "g"))
        for name in projections:
            layer = convolution(self.dim, self.inner, 1, bias=options.qkv_bias)
            self.add_module(name, layer)
        self.out = convolution(self.inner, self.dim, 1, bias=options.out_bias)
        for name in projections:
            layers.initialise(self.get_submodule(name), options.init)
        layers.initialise(self.out, options.out_init)
        self.norm = norm
        self.pool = None if options.pool is None else layers.POOLINGS[self.dims](options.pool)
        self.region = None
        if self.region_kernel is not None and max(self.region_kernel) > 1:
            self.region = layers.RegionAggregation(self.inner, self.region_kernel)
            self.region.initialise(options.init)
        if self.kind == "concat":
            self.concat_weight = nn.Parameter(torch.empty(2, self.inner))
            layers.initialise_concat(self.concat_weight, options.out_init)
        layers.close(self.out, self.norm, options.zero_init)

    def _attend(self, *rows: torch.Tensor) -> torch.Tensor:
        if self.kind == "concat":
            return functional.nonlocal_concat(*rows, backend=self._backend)
        return functional.nonlocal_attention(*rows, **self._options())
