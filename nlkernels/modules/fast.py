"""A block's fast path: projections, pooling, attention, output, norm and residual in few passes.

The same numbers as layer after layer (`plain`) but for rounding: `nlkernels/ops/block` says what is
computed in one, what is kept for the backward, and what is computed again there.

Kept for the backward beyond x and parameters, E bytes an element, A bytes a sum, N query and M key
positions of an item: E B (N (D + V) + M (D + V)) for query, key, value and what the attention
returned, 2 A B N for softmax, A B D V at most for dot_product (a quarter of query, key and value at
most); pooled "after", 2 bits a number of key and value (see
`nlkernels/ops/pool`); with a batch norm that trains E B C N more for its input where M < 5 C, which
is computed again otherwise. With `recompute` only E B N V, and the batch norm's.
"""

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from nlkernels._arguments import autocast, requested_backend
from nlkernels._operations import OPERATIONS
from nlkernels.modules import folding, layers, plain
from nlkernels.modules.affinity import scores
from nlkernels.modules.options import REGION_KINDS
from nlkernels.ops._positions import position_stride
from nlkernels.ops.block.layout import map_of
from nlkernels.ops.block.merge import Norm, merge
from nlkernels.ops.block.project import project
from nlkernels.ops.pool import op as pooling
from nlkernels.ops.pool.problem import LARGEST

if TYPE_CHECKING:
    from nlkernels.modules.base import NonLocalBlock

_PARTS = ("theta", "phi", "g", "out", "norm", "pool", "region")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# The output projection's product, C numbers a position, is kept for the backward of a batch norm
# unless rows of scores, which no block keeps, would be this many times as long.
_ROWS_OF_SCORES = 5


def obstacles(block: "NonLocalBlock") -> list[str]:
    """Why a block takes the plain path; an empty list where it takes this one."""
    if block.fused is False:
        return ["its attribute fused is False"]
    if requested_backend(block._backend, None, block._name) == "reference":
        return ["the backend reference is the definition"]
    found = []
    for name in _PARTS:
        part = getattr(block, name, None)
        if part is not None and (why := added(part)):
            found.append(f"{name} has {why}")
        elif isinstance(part, nn.Module) and type(part) is not _type_of(block, name, part):
            found.append(f"{name} is a {type(part).__name__}")
    window = block.pool_size
    if window is not None and torch.Size(window).numel() > LARGEST:
        found.append(f"it pools more than {LARGEST} numbers at once")
    return found


def added(part: nn.Module) -> str:
    """What a layer has beyond its class, so that it has to be called; "" if nothing."""
    if "forward" in part.__dict__:
        return "a forward of its own"
    hooks = (
        part._forward_hooks,
        part._forward_pre_hooks,
        part._backward_hooks,
        part._backward_pre_hooks,
    )
    return "hooks, which see what passes there" if any(map(len, hooks)) else ""


def _type_of(block: "NonLocalBlock", name: str, part: nn.Module) -> type:
    """The type of a part that is computed here; a norm of another type runs by itself."""
    if name == "norm":
        return type(part)
    if name == "region":
        return layers.RegionAggregation
    return (layers.POOLINGS if name == "pool" else layers.CONVOLUTIONS)[block.dims]


def operands(block: "NonLocalBlock", x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Operands of the attention of x (B, dim, *positions): query, key and value.

    Groups of frames are items of the batch. For "concat" query and key are scores (B,N), (B,M).
    """
    return _operands(block, _apart(block, x))[0]


def _operands(block, x):
    """The same, and x as the residual connection takes it."""
    (source,) = autocast(_laid_out(block, x))
    window = [] if block.pool_size is None else [*[1] * (3 - block.dims), *block.pool_size]
    after = block.pool_order == "after"
    backend = _backend(block)
    if block.kind == "concat":
        rows = _concatenated(block, source, window, after, backend)
    else:
        parts = (_parameters(block, name, source.dtype) for name in ("theta", "phi", "g"))
        rows = project(source, *parts, window, after, backend)
    query, key, value, through = rows
    if block.kind in REGION_KINDS:
        value = _items(query, x.shape[0])
        query, key, value = _regions(block, value, x.shape[2:], window, backend)
    groups = x.shape[0] * _groups(block, x)
    return tuple(_items(each, groups) for each in (query, key, value)), through


def forward(
    block: "NonLocalBlock", x: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The block's output, and the operands of its attention."""
    apart = _apart(block, x)
    out, rows = _forward(block, apart)
    return plain.unfold(out, x), rows


def _apart(block, x):
    """x, whose groups are items where they cannot be told apart later: regions end at edges."""
    pool = block.pool_size
    spans = pool is not None and block.temporal_group is not None and block.temporal_group % pool[0]
    return plain.fold(block, x) if spans or block.kind in REGION_KINDS else x


def _forward(block, x):
    if block.recompute and torch.is_grad_enabled():
        attended, rows, through = checkpoint(_attend, block, x, use_reentrant=False)
    else:
        attended, rows, through = _attend(block, x)
    weight, bias = _parameters(block, "out", rows[2].dtype)
    if attended is None:
        attended = rows[0]
        weight = folding.folded(rows, weight, block._options()["scale"], _backend(block))
    norm = _norm(block.norm)
    if norm is not None and norm.batch and x.numel() == x.shape[1]:
        raise ValueError(
            f"{block._name}: expected more than one position while the batch norm trains, got "
            f"{tuple(x.shape)}; use larger clips or batches, or block.norm.eval()"
        )
    keep = rows[1].shape[1] < _ROWS_OF_SCORES * block.dim
    # In an autocast region x is wider than what is added to it.
    inside = norm is not None and through.dtype == x.dtype
    out, mean, var = merge(
        _items(attended, through.shape[0]), through if inside else None, through.shape[2:], weight,
        bias, norm or Norm(), keep, _backend(block),
    )  # fmt: skip
    out = _as_given(out, x)
    if norm is None:
        out = block.norm(out)
    elif norm.batch and block.norm.training:
        _track(block.norm, mean, var)
    return (out if inside else x + out), rows


def score(block: "NonLocalBlock", x: torch.Tensor, which: int) -> torch.Tensor:
    """Scores (B, N) of a concatenation's query (0) or key (1) at all positions of x."""
    (source,) = autocast(_laid_out(block, x))
    layer = _parameters(block, ("theta", "phi")[which], source.dtype)
    composed, none = _composed(block.concat_weight[which], *layer), (None, None)
    found = project(source, composed, none, none, [], False, _backend(block))
    return _items(found.query, x.shape[0]).squeeze(2)


def _attend(block, x):
    """What the attention returns, (B, N, V), its operands, and x for the residual connection.

    None where the output projection takes the query's rows instead.
    """
    rows, through = _operands(block, x)
    if folding.pays(block.kind, rows, block.out.weight):
        return None, rows, through
    return _items(block._attend(*rows), x.shape[0]), rows, through


def _laid_out(block: "NonLocalBlock", x: torch.Tensor) -> torch.Tensor:
    """x (B, C, *positions) as (B, C, T, H, W), where that lies as the products read it.

    Clips of frames (B T, C, H, W) seen as (B, C, T, H, W) are frames again, (B T, C, 1, H, W),
    unless windows span several of them.
    """
    if block.dims < 3:
        return layers.lifted(x)
    frames = x.transpose(1, 2)
    spans = block.pool_size is not None and block.pool_size[0] > 1
    items_apart = x.stride(0) != x.shape[2] * x.stride(2) and x.shape[0] > 1
    if (
        spans
        or items_apart
        or position_stride(x) is not None
        or position_stride(x[:, :, 0]) is None
    ):
        return x
    return frames.flatten(0, 1).unsqueeze(2)


def _as_given(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What is laid out like `_laid_out(x)`, in x's own shape."""
    if out.shape[0] != x.shape[0]:
        return out.squeeze(2).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return layers.lowered(out, x.dim())


def _items(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Rows of as many positions as there are, as so many items: a view where they follow rows."""
    if rows.shape[0] == count:
        return rows
    positions = rows.shape[0] * rows.shape[1] // max(count, 1)
    return rows.reshape(count, positions, *rows.shape[2:])


def _groups(block: "NonLocalBlock", x: torch.Tensor) -> int:
    """Groups of frames that a clip has."""
    return 1 if block.temporal_group is None else max(1, x.shape[2] // block.temporal_group)


def _backend(block: "NonLocalBlock") -> str:
    """Backend of the products and the pooling: the block's where they have it, too."""
    backend = requested_backend(block._backend, None, block._name)
    return backend if backend in OPERATIONS["pointwise"].backends else "auto"


def _parameters(
    block: "NonLocalBlock", name: str, dtype: torch.dtype
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight (P, C) and bias (P,) of a projection; None for one that the block does not have."""
    layer = getattr(block, name, None)
    if layer is None:
        return None, None
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer.weight.flatten(1).to(dtype), bias


def _concatenated(block, source, window, after, backend):
    """Scores of a concatenation: a projection and the product with its weights are one, of one row.

    A key that is pooled after its projection is projected first.
    """
    theta, phi, g = (_parameters(block, name, source.dtype) for name in ("theta", "phi", "g"))
    first, second = block.concat_weight.to(source.dtype).unbind()
    pools = after and bool(window)
    key = phi if pools else _composed(second, *phi)
    rows = project(source, _composed(first, *theta), key, g, window, after, backend)
    scored = scores(rows.key, second) if pools else rows.key.squeeze(2)
    return rows._replace(query=rows.query.squeeze(2), key=scored)


def _composed(scores, weight, bias):
    """scores . (weight x + bias) as a projection of one row."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        scores = scores.to(wide)
        shift = None if bias is None else (scores @ bias.to(wide)).to(weight.dtype).view(1)
        return (scores @ weight.to(wide)).to(weight.dtype).view(1, -1), shift


def _regions(block, projected, sizes, window, backend):
    """Query and key are the aggregated map, value is the map itself; the last two pooled."""
    value = map_of(projected, sizes)
    query = plain.aggregated(block, value)
    key = _pooled(query, window, backend)
    maps = (query, key, value if query is value and not window else _pooled(value, window, backend))
    return layers.rows(*maps)


def _pooled(features, window, backend):
    """(B, P, *positions), pooled."""
    if not window:
        return features
    return layers.lowered(pooling.pool(layers.lifted(features), window, backend), features.dim())


def _norm(layer: nn.Module | None) -> Norm | None:
    """What a block's norm computes here; None for one that runs by itself."""
    if layer is None:
        return Norm()
    if type(layer) is layers.Affine:
        return Norm(layer.weight, layer.bias)
    if type(layer) not in _BATCH_NORMS or layer.weight is None:
        return None
    mean, var = layer.running_mean, layer.running_var
    if layer.training or mean is None:
        return Norm(layer.weight, layer.bias, eps=layer.eps, batch=True, group=_group(layer))
    return Norm(layer.weight, layer.bias, mean, var, layer.eps)


def _group(layer: nn.Module):
    """The processes with which a norm shares its statistics."""
    shared = type(layer) is nn.SyncBatchNorm and layer.training
    if not shared or not distributed.is_available() or not distributed.is_initialized():
        return None
    group = layer.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


@torch.no_grad()
def _track(layer: nn.Module, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Running statistics, as torch's batch norms keep them."""
    if not layer.track_running_stats or layer.running_mean is None:
        return
    momentum = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    for running, new in ((layer.running_mean, mean), (layer.running_var, var)):
        running.mul_(1 - momentum).add_(new.to(running.dtype), alpha=momentum)
