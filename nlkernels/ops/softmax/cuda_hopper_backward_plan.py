"""How the Hopper kernel of the softmax backward tiles a chunk of queries, or why it does not.

Tiles are 128 queries by 192, 160, 128 or 64 keys (csrc/cuda/hopper/d_scores.cuh), or 64 where
channels come first. Wide ones move fewer bytes of shared memory for a product, narrow ones leave
less of the last wave of blocks idle, and fewer columns beyond the last key.

The order of the plans is predicted from the traffic of shared memory, not measured; `run_best` of
`nlkernels._tune` measures those of `candidates` where it is asked to.
"""

import math
from typing import NamedTuple

import torch

from nlkernels._spec import Problem
from nlkernels.ops.softmax.cuda_hopper_plan import SHARED_LIMIT

TILE_ROWS = 128
# A slot for each chunk that is multiplied while weights are made, and one to copy into.
FEWEST_SLOTS = 4
_LINE = 64
_DTYPES = (torch.bfloat16, torch.float16)
_WIDTHS = (192, 160, 128, 64)


class Plan(NamedTuple):
    """How a chunk is laid out, as `HopperBackwardPlan` of csrc/include/nlk/cuda/hopper_attention.h.

    Attributes:
        channel_first: operands are (B,C,N) in memory.
        tile_keys: keys of a tile.
        cluster: blocks that share the copies of keys and values.
        slots: chunks of 64 channels, of a tile's queries and keys, in flight.
    """

    channel_first: bool
    tile_keys: int
    cluster: int = 1
    slots: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return (TILE_ROWS + self.tile_keys) * 2 * _LINE

    def shared_bytes(self) -> int:
        """Bytes of shared memory that a block takes."""
        return self.slots * self.slot_bytes + 8 * (2 + 2 * self.slots) + 1024

    def key_tiles(self, keys: int) -> int:
        """How many tiles hold so many keys."""
        return -(-keys // self.tile_keys)

    def clocks(self) -> tuple[int, int]:
        """Clocks of one chunk of a product: of tensor cores, and of shared memory."""
        steps = 2 * _LINE // 16
        read = steps * (64 + self.tile_keys) * 32
        return steps * self.tile_keys // 2, (read + self.slot_bytes) // 128


class Chunk(NamedTuple):
    """How many rows of each of how many items are computed at a time, and on what.

    Attributes:
        items: batch items.
        rows: queries of each.
        multiprocessors: blocks that run at a time.
    """

    items: int
    rows: int
    multiprocessors: int = 132


def unserved(problem: Problem) -> str:
    """Why no Hopper kernel takes a problem of these sizes and this dtype; "" when one does."""
    if problem.dtype not in _DTYPES:
        return f"its products are of bfloat16 and float16, not {problem.dtype_name}"
    if max(problem.queries, problem.keys) >= 2**31 - 2**10:
        return "positions are counted in 32 bits"
    for name, size in (("D", problem.depth), ("V", problem.value_depth)):
        if size < _LINE:
            return f"{name} = {size} would leave most of a step of {_LINE} empty"
    return ""


def candidates(problem: Problem, chunk: Chunk, channel_first: bool = False) -> list[Plan]:
    """The plans that run by themselves, the predicted best first: no clusters."""
    return [plan for plan in alternatives(problem, chunk, channel_first) if plan.cluster == 1]


def alternatives(problem: Problem, chunk: Chunk, channel_first: bool = False) -> list[Plan]:
    """All plans of a problem that `unserved` accepts, the predicted best first."""
    plans = []
    for width in (_LINE,) if channel_first else _WIDTHS:
        for cluster in (1,) if width == _LINE else (1, 2):
            plan = Plan(channel_first, width, cluster)
            slots = (SHARED_LIMIT - plan.shared_bytes()) // (plan.slot_bytes + 16)
            plans.append(plan._replace(slots=slots))
    return sorted(plans, key=lambda plan: _predicted(plan, problem, chunk))


def _predicted(plan: Plan, problem: Problem, chunk: Chunk) -> int:
    """Clocks of the products of a chunk of queries."""
    clusters = math.ceil(chunk.rows / (TILE_ROWS * plan.cluster)) * chunk.items
    at_once = max(1, chunk.multiprocessors // plan.cluster)
    waves = -(-clusters * plan.key_tiles(problem.keys) // at_once)
    steps = -(-problem.depth // _LINE) + -(-problem.value_depth // _LINE)
    return waves * steps * max(plan.clocks())
