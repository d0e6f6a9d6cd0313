"""Softmax attention in one Triton kernel: a pass over the keys that keeps only running sums.

For a tile of query rows, over tiles of keys j with products s_ij = query_i . key_j and
c = scale * log2(e):

    top    = max(top, max_j s_ij)                   (min where scale < 0)
    fade   = exp2(c (old top - top))
    total  = fade total + sum_j exp2(c (s_ij - top))
    out    = fade out + sum_j exp2(c (s_ij - top)) value_j,        divided by total at the end

Products, sums and statistics are float32. Wide query and key are read in pieces of `depth`
channels; channels of value that do not fit beside the scores go to further programs, each of which
computes the scores again. Where query tiles are too few to fill the GPU, keys are split over
programs as well, and `triton_combine` adds the parts in a fixed order.

Memory beyond inputs and outputs: none, but with S > 1 splits 4 S B N (V + 2) bytes for their
parts, at most 40 MiB; specialised kernels also let torch allocate 384 bytes for each program.

No GPU has run these kernels yet: unverified.
"""

import torch
import triton
import triton.language as tl

from nlkernels import _launch, _tune
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops._tiles import LOG2E
from nlkernels.ops._triton_tiles import arrangement
from nlkernels.ops.softmax import triton_combine
from nlkernels.ops.softmax.triton_fused_plan import candidates, processors, split


@triton.jit
def _tile(
    operand,
    item,
    start,
    first,
    rows,
    channels,
    item_stride,
    row_stride,
    channel_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_CHANNELS: tl.constexpr,
    LOADS: tl.constexpr,
    CHANNEL_FIRST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """ROWS x CHANNELS of one item, from row `start` and channel `first`; zero beyond its sizes."""
    if LOADS == "host" and CHANNEL_FIRST:
        tile = operand.load([item, first, start]).reshape(CHANNELS, ROWS).T
    elif LOADS == "host":
        tile = operand.load([item, start, first]).reshape(ROWS, CHANNELS)
    elif LOADS == "device" and CHANNEL_FIRST:
        tile = operand.load([first, start]).T
    elif LOADS == "device":
        tile = operand.load([start, first])
    else:
        row, channel = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
        inside = tl.full([ROWS, CHANNELS], True, tl.int1)
        if not EVEN_ROWS:
            inside = (start + row < rows)[:, None] & inside
        if not EVEN_CHANNELS:
            inside = (first + channel < channels)[None, :] & inside
        base = operand + tl.cast(item, tl.int64) * item_stride
        base += tl.cast(start, tl.int64) * row_stride + tl.cast(first, tl.int64) * channel_stride
        if WIDE:
            row, channel = row.to(tl.int64), channel.to(tl.int64)
        at = base + row[:, None] * row_stride + channel[None, :] * channel_stride
        if EVEN_ROWS and EVEN_CHANNELS:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def _described(
    operand,
    item,
    rows,
    channels,
    item_stride,
    row_stride,
    channel_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNEL_FIRST: tl.constexpr,
):
    """Descriptor of one item, of its transpose where channels are not innermost."""
    base = operand + tl.cast(item, tl.int64) * item_stride
    if CHANNEL_FIRST:
        made = tl.make_tensor_descriptor(
            base, [channels, rows], [tl.cast(channel_stride, tl.int64), 1], [CHANNELS, ROWS]
        )
    else:
        made = tl.make_tensor_descriptor(
            base, [rows, channels], [tl.cast(row_stride, tl.int64), 1], [ROWS, CHANNELS]
        )
    return made


@triton.jit(do_not_specialize=["batch", "query_tiles", "splits"])
def attend(
    query,
    key,
    value,
    out,
    stats,
    factor,
    shift,
    unit,
    batch,
    queries,
    keys,
    depth,
    value_depth,
    query_tiles,
    splits,
    split_keys,
    query_item,
    query_row,
    query_channel,
    key_item,
    key_row,
    key_channel,
    value_item,
    value_row,
    value_channel,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STREAMED: tl.constexpr,
    VALUES: tl.constexpr,
    VALUE_TILES: tl.constexpr,
    EVEN_KEYS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    EVEN_VALUES: tl.constexpr,
    SIGN: tl.constexpr,
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
    LOADS: tl.constexpr,
    QUERY_FIRST: tl.constexpr,
    KEY_FIRST: tl.constexpr,
    VALUE_FIRST: tl.constexpr,
    SPECIALISED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of queries, of value channels and of keys of one batch item."""
    program = tl.program_id(0)
    row = (program % query_tiles) * ROWS
    program = program // query_tiles
    channel = (program % VALUE_TILES) * VALUES
    program = program // VALUE_TILES
    split = program % splits
    item = program // splits
    if LOADS == "device":
        query = _described(
            query, item, queries, depth, query_item, query_row, query_channel,
            ROWS, DEPTH, QUERY_FIRST,
        )  # fmt: skip
        key = _described(
            key, item, keys, depth, key_item, key_row, key_channel,
            COLUMNS, DEPTH, KEY_FIRST,
        )  # fmt: skip
        value = _described(
            value, item, keys, value_depth, value_item, value_row, value_channel,
            COLUMNS, VALUES, VALUE_FIRST,
        )  # fmt: skip

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUES], tl.float32)
    if not STREAMED:
        q = _tile(
            query, item, row, 0, queries, depth, query_item, query_row, query_channel,
            ROWS, DEPTH, False, EVEN_DEPTH, LOADS, QUERY_FIRST, WIDE,
        )  # fmt: skip
    end = tl.minimum(keys, (split + 1) * split_keys)
    for start in tl.range(split * split_keys, end, COLUMNS, warp_specialize=SPECIALISED):
        if STREAMED:
            products = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in tl.range(0, depth, DEPTH):
                q = _tile(
                    query, item, row, first, queries, depth, query_item, query_row, query_channel,
                    ROWS, DEPTH, False, EVEN_DEPTH, LOADS, QUERY_FIRST, WIDE,
                )  # fmt: skip
                k = _tile(
                    key, item, start, first, keys, depth, key_item, key_row, key_channel,
                    COLUMNS, DEPTH, EVEN_KEYS, EVEN_DEPTH, LOADS, KEY_FIRST, WIDE,
                )  # fmt: skip
                products = tl.dot(q, k.T, products, input_precision=PRECISION)
        else:
            k = _tile(
                key, item, start, 0, keys, depth, key_item, key_row, key_channel,
                COLUMNS, DEPTH, EVEN_KEYS, EVEN_DEPTH, LOADS, KEY_FIRST, WIDE,
            )  # fmt: skip
            products = tl.dot(q, k.T, input_precision=PRECISION)
        if SIGN < 0:
            products = -products
        if not EVEN_KEYS:
            present = (start + tl.arange(0, COLUMNS) < keys)[None, :]
            products = tl.where(present, products, float("-inf"))
        larger = tl.maximum(top, tl.max(products, 1))
        # Where every product so far is -inf, and where the scale is 0, nothing may be subtracted:
        # -inf - -inf and 0 * -inf are NaN.
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        if SIGN == 0:
            origin = tl.zeros([ROWS], tl.float32)
        weights = (products - origin[:, None]) * factor
        if PRECISION == "ieee":
            weights = tl.exp2(weights - shift)
        else:
            weights = tl.exp2(weights) * unit
        if SIGN == 0 and not EVEN_KEYS:
            weights = tl.where(present, weights, 0.0)
        fade = tl.where(top == float("-inf"), 0.0, tl.exp2((top - origin) * factor))
        total = total * fade + tl.sum(weights, 1)
        top = larger
        v = _tile(
            value, item, start, channel, keys, value_depth, value_item, value_row, value_channel,
            COLUMNS, VALUES, EVEN_KEYS, EVEN_VALUES, LOADS, VALUE_FIRST, WIDE,
        )  # fmt: skip
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)

    if not PARTIAL:
        sums = sums * (1.0 / total)[:, None]
    lines = tl.arange(0, ROWS)
    columns = channel + tl.arange(0, VALUES)
    inside = row + lines < queries
    part = tl.cast(split * batch + item, tl.int64) * queries + row
    at = lines[:, None].to(tl.int64) * value_depth if WIDE else lines[:, None] * value_depth
    stored = inside[:, None] if EVEN_VALUES else inside[:, None] & (columns < value_depth)[None, :]
    tl.store(
        out + part * value_depth + at + columns[None, :], sums.to(out.dtype.element_ty), mask=stored
    )
    # Of the programs that share these rows, the one of the first value channels writes them.
    inside = inside & (channel == 0)
    place = stats + (tl.cast(split, tl.int64) * 2 * batch + item) * queries + row + lines
    tl.store(place, -top if SIGN < 0 else top, mask=inside)
    tl.store(place + tl.cast(batch, tl.int64) * queries, total / unit, mask=inside)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out (B,N,V) and stats (2,B,N): each row's extreme product, and its sum."""
    problem, device = Problem.of(query, key, value), query.device
    out = query.new_empty(problem.batch, problem.queries, problem.value_depth)
    stats = query.new_empty(2, problem.batch, problem.queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, stats
    shipped = candidates(problem, _launch.architecture(device))
    described = _launch.has_descriptors(device) and _layouts(query, key, value) is not None
    if described:
        usable = shipped
    elif all(map(_aligned, (query, key, value))):
        usable = [config for config in shipped if not config.descriptors]
    else:
        usable = shipped[-1:]

    def run(config: Config) -> None:
        _attend(config if config in usable else usable[0], query, key, value, scale, out, stats)

    _tune.run_best("softmax_fused", problem, device, usable, run)
    return out, stats


def _layouts(*operands: torch.Tensor) -> list[bool] | None:
    """Whether each operand is channel-first; None when a descriptor cannot read one of them."""
    if not any(_launch.undescribable(t, -1) for t in operands):
        return [False] * len(operands)
    layouts = [bool(_launch.undescribable(t, -1)) for t in operands]
    for tensor, channel_first in zip(operands, layouts, strict=True):
        if channel_first and _launch.undescribable(tensor, 1):
            return None
    return layouts


def _aligned(tensor: torch.Tensor) -> bool:
    """Whether pointers can load 16 bytes at a time, as Triton sees it: multiples of 16 elements."""
    _, *strides = tensor.stride()
    if 1 not in strides or tensor.data_ptr() % 16:
        return False
    strides.remove(1)
    return not any(stride % 16 for stride in (tensor.stride(0), *strides))


def _attend(
    config: Config,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    batch, queries, depth = query.shape
    _, keys, value_depth = value.shape
    channels = arrangement(config, depth, value_depth, query.dtype)
    query_tiles = triton.cdiv(queries, config.rows)
    programs = query_tiles * channels["VALUE_TILES"] * batch
    splits, tiles = split(
        config, batch, queries, keys, value_depth, programs, processors(query.device)
    )
    parts, part_stats = out, stats
    if splits > 1:
        parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
        part_stats = stats.new_empty(splits, *stats.shape)
    factor, sign = _factor(scale)
    # A sum of `keys` weighted values then stays below the largest value; float16 has no values
    # large enough to need it, and too few exponents to bear it.
    shift = 0 if query.dtype == torch.float16 else keys.bit_length()
    operands = (query, key, value)
    layouts = _layouts(*operands) if config.descriptors else None
    loads = "pointer"
    if layouts is not None:
        loads = "device" if config.specialised else "host"
    sources = operands
    if loads == "host":
        shapes = [
            (config.rows, channels["DEPTH"]),
            (config.columns, channels["DEPTH"]),
            (config.columns, channels["VALUES"]),
        ]
        sources = [_descriptor(*each) for each in zip(operands, layouts, shapes, strict=True)]
    first = layouts or [False] * 3
    _launch.launch(
        attend,
        (programs * splits,),
        *sources,
        parts,
        part_stats,
        factor,
        float(shift),
        2.0**-shift,
        batch,
        queries,
        keys,
        depth,
        value_depth,
        query_tiles,
        splits,
        tiles * config.columns,
        *(stride for tensor in operands for stride in tensor.stride()),
        config=config,
        scratch=loads == "device",
        ROWS=config.rows,
        COLUMNS=config.columns,
        **channels,
        EVEN_KEYS=keys % config.columns == 0,
        EVEN_DEPTH=depth % channels["DEPTH"] == 0,
        EVEN_VALUES=value_depth % channels["VALUES"] == 0,
        SIGN=sign,
        PARTIAL=splits > 1,
        PRECISION=_launch.precision(query.dtype),
        LOADS=loads,
        QUERY_FIRST=first[0],
        KEY_FIRST=first[1],
        VALUE_FIRST=first[2],
        SPECIALISED=config.specialised and loads == "device",
        WIDE=_launch.wide(*(t[0] for t in (*operands, out))),
    )
    if splits > 1:
        triton_combine.combine(parts, part_stats, out, stats, factor, sign, 2.0**-shift)


def _descriptor(tensor: torch.Tensor, channel_first: bool, tile: tuple[int, int]):
    """Host-made descriptor of tiles of (rows, channels)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    view, tile = (tensor.mT, tile[::-1]) if channel_first else (tensor, tile)
    return TensorDescriptor(tensor, list(view.shape), list(view.stride()), [1, *tile])


def _factor(scale: float) -> tuple[float, int]:
    """|c| and the sign of c, for c = scale * log2(e); zero where float32 rounds it to zero."""
    factor = abs(scale) * LOG2E
    if factor <= 2.0**-150:
        return 0.0, 0
    return factor, 1 if scale > 0 else -1


KERNELS = {"softmax_fused": candidates}
