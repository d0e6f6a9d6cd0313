"""Which Hopper kernel runs a softmax forward, how it divides shared memory, or why none does.

    rows    V <= 256: blocks of 128 queries (csrc/cuda/hopper/forward_rows.cuh)
    split   V <= 512: blocks of 64 queries, whose value channels two warpgroups share; beyond
            D = 512 chunks of the queries are streamed with those of the keys (forward_split.cuh)

A step of wgmma sums 16 keys, so tiles have 64, 80 or 112 of them; 56, which would divide 7 * 2^k,
is no multiple of 16, and its product with the values would take as long as that of 64.

What is chosen where several plans would do (`tile_keys`, `cluster`, slots) is predicted from the
traffic of shared memory, not measured: the choices to compare are those of `alternatives`.
"""

from typing import NamedTuple

import torch

from nlkernels._spec import Problem

SHARED_LIMIT = 232448
VALUES = 256
_LINE = 64
_DTYPES = (torch.bfloat16, torch.float16)
_MOST_KEY_SLOTS = 16


class Plan(NamedTuple):
    """How a problem is laid out, as `HopperPlan` of csrc/include/nlk/cuda/hopper_attention.h.

    Attributes:
        split: two warpgroups share the value channels of 64 queries; else each has 64 queries.
        streamed: chunks of the queries are copied again for every tile of keys.
        channel_first: operands are (B,C,N) in memory.
        tile_keys: keys of a tile.
        cluster: blocks that share the copies of keys and values.
        key_slots: chunks of 64 channels of keys in flight.
        value_slots: tiles of 256 channels of values in flight, for each half where split.
    """

    split: bool
    streamed: bool
    channel_first: bool
    tile_keys: int
    cluster: int = 1
    key_slots: int = 0
    value_slots: int = 0

    def shared_bytes(self, depth: int) -> int:
        """Bytes of shared memory that a block takes."""
        rows = 64 if self.split else 128
        chunk, query = self.tile_keys * 128, rows * 128
        halves = 2 if self.split else 1
        total = 0 if self.streamed else -(-depth // _LINE) * query
        total += self.key_slots * (chunk + (query if self.streamed else 0))
        total += halves * self.value_slots * VALUES // _LINE * chunk
        total += 2 * rows * (128 + 4) if self.split else 0
        barriers = 2 + 2 * self.key_slots + 2 * halves * self.value_slots + (4 if self.split else 0)
        return total + 8 * barriers + 1024


def unserved(problem: Problem) -> str:
    """Why no Hopper kernel takes a problem of these sizes and this dtype; "" when one does."""
    depth, value_depth = problem.depth, problem.value_depth
    if problem.dtype not in _DTYPES:
        return f"its products are of bfloat16 and float16, not {problem.dtype_name}"
    if value_depth <= VALUES // 2:
        return f"V = {value_depth} would leave half of its {VALUES} accumulated channels empty"
    if value_depth > 2 * VALUES:
        return f"V = {value_depth} is more than the {2 * VALUES} channels a block accumulates"
    if value_depth % 8:
        return f"V = {value_depth} is no multiple of the 8 channels that a thread stores"
    if max(problem.queries, problem.keys) >= 2**31 - 2**10:
        return "positions are counted in 32 bits"
    return "" if depth >= _LINE else f"D = {depth} would leave most of a step of {_LINE} empty"


def plan(problem: Problem, channel_first: bool = False) -> Plan:
    """The plan of a problem that `unserved` accepts."""
    return alternatives(problem, channel_first)[0]


def alternatives(problem: Problem, channel_first: bool = False) -> list[Plan]:
    """All plans that fit, the predicted best first.

    Rows of 80 keys move the fewest bytes of shared memory for a product; 64 are taken where they
    spare a twentieth of the keys that are only padding.
    """
    split = problem.value_depth > VALUES or problem.depth > 512
    streamed = split and problem.depth > 512
    widths = [64] if split or channel_first or problem.depth > 256 else [80, 64, 112]
    if len(widths) > 1 and _padded(problem.keys, 64) <= 0.95 * _padded(problem.keys, 80):
        widths = [64, 80, 112]
    made = []
    for width in widths:
        for cluster in (1,) if channel_first or width == 112 else (1, 2):
            base = Plan(split, streamed, channel_first, width, cluster)
            made += _filled(base, problem.depth)
    return made


def _padded(keys: int, tile: int) -> int:
    return -(-keys // tile) * tile


def _filled(base: Plan, depth: int) -> list[Plan]:
    """The plan with as many slots as fit, two of values first where eight of keys fit beside them.

    Keys matter more: their products come between those of one tile's values and the next.
    """
    chunks = -(-depth // _LINE)
    found = []
    for value_slots in (2, 1):
        key_slots = min(_MOST_KEY_SLOTS, 2 * chunks)
        filled = base._replace(key_slots=key_slots, value_slots=value_slots)
        while filled.shared_bytes(depth) > SHARED_LIMIT:
            filled = filled._replace(key_slots=filled.key_slots - 1)
        if filled.key_slots >= 2:
            found.append(filled)
    return sorted(found, key=lambda each: each.key_slots < min(2 * chunks, 8))
