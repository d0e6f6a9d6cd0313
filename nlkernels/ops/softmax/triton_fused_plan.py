"""How the fused softmax forward is arranged: tiles, their candidates, and splits of the keys."""

import functools

import torch
import triton

from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops._triton_tiles import arrangement, padded_channels

# Most memory for the parts of split keys.
PARTIAL_BYTES = 40 * 2**20
# Multiprocessors of an H200: for its plans, and where kernels are interpreted.
PROCESSORS = 132

# By the larger of D and V, padded to a power of two, up to: configurations, the most promising
# first. They come from compilation for sm_80, sm_89, sm_90 and sm_120 with Triton 3.6 and 3.7 (no
# spilled registers, shared memory of the part); their order is reasoned, not measured.
_WIDE = 2**31
_DESCRIBED = {
    # Keys 64 at a time: wgmma multiplies 32 at two thirds of the speed, and Triton has no tiles of
    # 56 or 112, which would fit 7 * 2^k keys: 6% of the work is lost at 784 keys, 23% at 196.
    (90, 2): {
        128: [
            Config(128, 128, 0, 4, 2, True, True),
            Config(128, 128, 0, 8, 2, True),
            Config(128, 64, 0, 8, 3, True),
            Config(64, 64, 0, 4, 3, True),
        ],
        256: [
            Config(128, 64, 0, 4, 2, True, True),
            Config(64, 64, 0, 4, 3, True),
            Config(128, 64, 0, 8, 2, True),
        ],
        _WIDE: [
            Config(128, 64, 64, 8, 3, True),
            Config(128, 64, 128, 8, 2, True),
            Config(64, 64, 64, 4, 3, True),
        ],
    },
    (120, 2): {
        128: [Config(128, 32, 0, 8, 2, True)],
        # With queries kept whole, channel-first operands spill.
        256: [Config(64, 64, 64, 8, 2, True), Config(64, 32, 64, 4, 2, True)],
        _WIDE: [Config(64, 64, 64, 4, 2, True), Config(64, 32, 64, 4, 2, True)],
    },
    (90, 4): {
        64: [Config(64, 32, 0, 4, 2, True), Config(64, 32, 32, 4, 2, True)],
        _WIDE: [Config(32, 32, 32, 8, 2, True), Config(64, 32, 32, 4, 2, True)],
    },
}
_POINTERS = {
    (90, 2): {
        128: [Config(64, 64, 0, 4, 2)],
        256: [Config(64, 64, 0, 8, 2), Config(64, 64, 0, 4, 2)],
        _WIDE: [Config(64, 64, 64, 8, 3)],
    },
    (80, 2): {
        64: [Config(128, 64, 0, 8, 2), Config(64, 64, 0, 4, 2)],
        128: [Config(128, 32, 0, 8, 2), Config(64, 32, 0, 4, 2)],
        256: [Config(64, 32, 0, 8, 2), Config(64, 64, 64, 8, 3)],
        _WIDE: [Config(32, 64, 64, 8, 2), Config(64, 64, 64, 8, 3)],
    },
    (80, 4): {_WIDE: [Config(32, 32, 32, 8, 2), Config(64, 32, 32, 4, 2)]},
    (120, 4): {_WIDE: [Config(32, 32, 32, 8, 2)]},
}
# Addresses of single elements take the most registers: for operands nothing else can read.
_CAUTIOUS = {(90, 2): Config(128, 64, 16, 8, 2)}
_MOST_CAUTIOUS = Config(64, 16, 32, 4, 2)


@functools.lru_cache(maxsize=1024)
def split(
    config: Config,
    batch: int,
    queries: int,
    keys: int,
    value_depth: int,
    programs: int,
    processors: int,
) -> tuple[int, int]:
    """How many programs share the keys of a row, and how many key tiles each of them takes.

    The fewest splits within 15% of the shortest time, which is counted in key tiles: whole waves
    of programs, each with its tiles and one more for its beginning and end. Specialised kernels
    have no room for the float32 parts.
    """
    key_tiles = triton.cdiv(keys, config.columns)
    if programs >= 0.8 * processors or key_tiles <= 4 or config.specialised:
        return 1, key_tiles
    room = PARTIAL_BYTES // (4 * batch * queries * (value_depth + 2))
    # More than two waves never pay.
    most = max(1, min(key_tiles, room, 2 * processors // programs))
    times = {}
    for splits in range(1, most + 1):
        tiles = triton.cdiv(key_tiles, splits)
        times[splits] = triton.cdiv(programs * splits, processors) * (tiles + 1)
    splits = min(s for s, time in times.items() if time <= min(times.values()) / 0.85)
    tiles = triton.cdiv(key_tiles, splits)
    return triton.cdiv(key_tiles, tiles), tiles


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS


def candidates(problem: Problem, architecture: int) -> list[Config]:
    """Configurations for one problem, the most promising first; the last takes any strides."""
    return list(_ranked(problem, architecture))


@functools.lru_cache(maxsize=1024)
def _ranked(problem: Problem, architecture: int) -> tuple[Config, ...]:
    width = padded_channels(max(problem.depth, problem.value_depth))
    size = 4 if problem.dtype == torch.float32 else 2
    pointers = _POINTERS.get((architecture, size)) or _POINTERS[80, size]
    ranked = []
    for table in (_DESCRIBED.get((architecture, size)), pointers):
        if table:
            configs = table[min(bound for bound in table if width <= bound)]
            # Of equals, the one named first.
            ranked += sorted(configs, key=lambda config: _time(config, problem))
    return (*ranked, _CAUTIOUS.get((architecture, size), _MOST_CAUTIOUS))


def _time(config: Config, problem: Problem) -> float:
    """Time that a configuration takes, reckoned as multiplications of one multiprocessor."""
    depth, values = problem.depth, problem.value_depth
    value_tiles = arrangement(config, depth, values, problem.dtype)["VALUE_TILES"]
    programs = problem.batch * triton.cdiv(problem.queries, config.rows) * value_tiles
    sizes = (problem.batch, problem.queries, problem.keys, values)
    splits, tiles = split(config, *sizes, programs, PROCESSORS)
    tile = config.rows * config.columns * (depth + values / value_tiles)
    # Half the rows read keys and values twice as often: reckoned, not measured.
    reads = 1.15 if config.rows < 128 else 1.0
    return triton.cdiv(programs * splits, PROCESSORS) * (tiles + 1) * tile * reads
