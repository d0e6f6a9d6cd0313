"""The problems that are measured: the shapes at which published networks run a non-local block.

Every entry is a `Layer`: a stage of a network with its feature grid at each crop size. A layer
gives one `Case` per crop size and kind. `N = T*H*W`; the keys are the grid after the block's 2x2
spatial pooling (`M = N/4`) or, where the network does not pool, the grid itself. Softmax and
dot_product operate on the block's inner width (`D = V = inner`), gaussian on the layer's channels
(`D = channels`, `V = inner`), concat on one score for each position (`D = 1`, `V = inner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

KINDS = ("softmax", "gaussian", "dot_product", "relu", "concat")
PUBLISHED = ("softmax", "gaussian", "dot_product", "concat")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One measured problem.

    Attributes:
        name: `<system>/<stage>@<crop size>`.
        kind: Affinity, one of `KINDS`.
        batch, n, m, d, v: Sizes of query (batch, n, d), key (batch, m, d) and value (batch, m, v).
        groups: Selection words, such as "acceptance" or "quick".
    """

    name: str
    kind: str
    batch: int
    n: int
    m: int
    d: int
    v: int
    groups: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """The multiplier of q.k: D**-0.5 keeps exponentials tame; the other kinds have none."""
        return self.d**-0.5 if self.kind in ("softmax", "gaussian") else 1.0

    def flop(self, passes: str) -> int:
        """Nominal floating-point operations: 2BNM(D+V) forward, 2.5 times that backward.

        The count is the same for every implementation, whatever it recomputes or reassociates.
        Scores of concat are sums, not products: 2BNMV.
        """
        width = self.v if self.kind == "concat" else self.d + self.v
        forward = 2 * self.batch * self.n * self.m * width
        return forward if passes == "forward" else forward + 5 * forward // 2

    def least_flop(self, passes: str) -> int:
        """Operations of the form that needs the fewest, to state shares of a peak.

        dot_product may be computed as query @ (key^T @ value), with four such products more in the
        backward. concat adds up sorted numbers, one for each position and channel of value.
        """
        positions = self.batch * (self.n + self.m) * self.v
        if self.kind == "concat":
            return 2 * positions * (1 if passes == "forward" else 3)
        if self.kind != "dot_product":
            return self.flop(passes)
        # Of the gradients, those of query and the state read N positions, the others M.
        linear = 2 * positions * self.d * (1 if passes == "forward" else 3)
        return min(linear, self.flop(passes))

    def traffic(self, passes: str, itemsize: int) -> int:
        """Fewest bytes: operands and output; then operands again, and all gradients."""
        operands = self.batch * ((self.n + self.m) * self.d + self.m * self.v) * itemsize
        output = self.batch * self.n * self.v * itemsize
        forward = operands + output
        return forward if passes == "forward" else forward + 2 * operands + output


@dataclass(frozen=True)
class Layer:
    """A stage of a network that carries non-local blocks.

    Attributes:
        name: `<system>/<stage>`.
        grids: Crop size in pixels -> (T, H, W) of the stage's features.
        channels, inner: Channels entering the block and its inner width.
        batch: Clips per step; the networks train with 8 per GPU, long clips with 2.
        pooled: Whether keys are pooled 2x2 in space.
        kinds: Affinities published for this layer; relu, that of region-based blocks, is also
            measured at the longest clips.
        also: Other systems whose blocks see the same shape.
    """

    name: str
    grids: dict[int, tuple[int, int, int]]
    channels: int
    inner: int
    batch: int
    pooled: bool = True
    kinds: tuple[str, ...] = PUBLISHED
    also: tuple[str, ...] = ()


LAYERS = (
    Layer(
        "c2d_r50_8x8/res3",
        {224: (4, 28, 28), 256: (4, 32, 32)},
        channels=512,
        inner=256,
        batch=8,
        also=(
            "C2D and I3D, R50 and R101, 8x8 and 32x2",
            "SlowOnly 4x16 layer2",
            "32x4 and 128x1 in groups of 4 frames (2 clips make a batch of 8)",
        ),
    ),
    Layer(
        "c2d_r50_8x8/res4",
        {224: (4, 14, 14), 256: (4, 16, 16)},
        channels=1024,
        inner=512,
        batch=8,
        also=("C2D and I3D, R50 and R101, 8x8 and 32x2", "SlowOnly 4x16 layer3"),
    ),
    Layer(
        "c2d_r50_128x1/res3",
        {224: (16, 28, 28), 256: (16, 32, 32)},
        channels=512,
        inner=256,
        batch=2,
        kinds=KINDS,
        also=("32x4 without temporal groups", "MindSpore 32 frames res3", "TSM 16 segments layer2"),
    ),
    Layer(
        "c2d_r50_128x1/res4",
        {224: (16, 14, 14), 256: (16, 16, 16)},
        channels=1024,
        inner=512,
        batch=2,
        kinds=KINDS,
        also=("32x4", "MindSpore 32 frames res4", "TSM 16 segments layer3"),
    ),
    Layer(
        "tsm_r50_8seg/layer2",
        {224: (8, 28, 28), 256: (8, 32, 32)},
        channels=512,
        inner=256,
        batch=8,
        also=("SlowOnly 8x8 layer2",),
    ),
    Layer(
        "tsm_r50_8seg/layer3",
        {224: (8, 14, 14), 256: (8, 16, 16)},
        channels=1024,
        inner=512,
        batch=8,
        also=("SlowOnly 8x8 layer3",),
    ),
    Layer(
        "rnl_r50_8seg/layer2",
        {224: (8, 28, 28), 256: (8, 32, 32)},
        channels=512,
        inner=256,
        batch=8,
        pooled=False,
        kinds=("softmax", "relu"),
    ),
    Layer(
        "rnl_r50_8seg/layer3",
        {224: (8, 14, 14), 256: (8, 16, 16)},
        channels=1024,
        inner=512,
        batch=8,
        pooled=False,
        kinds=("softmax", "relu"),
    ),
    Layer(
        "rnl_r50_16seg/layer2",
        {224: (16, 28, 28), 256: (16, 32, 32)},
        channels=512,
        inner=256,
        batch=2,
        pooled=False,
        kinds=("softmax", "relu"),
    ),
    Layer(
        "rnl_r50_16seg/layer3",
        {224: (16, 14, 14), 256: (16, 16, 16)},
        channels=1024,
        inner=512,
        batch=2,
        pooled=False,
        kinds=("softmax", "relu"),
    ),
    Layer(
        "inception_flow_64/mixed_3c",
        {224: (32, 28, 28)},
        channels=480,
        inner=240,
        batch=2,
        kinds=("softmax",),
    ),
    Layer(
        "inception_flow_64/mixed_4d",
        {224: (16, 14, 14)},
        channels=512,
        inner=256,
        batch=2,
        kinds=("softmax",),
    ),
)

GROUPS = {
    "acceptance": ("c2d_r50_128x1/res3@224",),
    "long": ("c2d_r50_128x1/res3@224", "c2d_r50_128x1/res3@256"),
    "quick": ("c2d_r50_8x8/res4@224",),
    "targets": (
        "c2d_r50_128x1/res3@224",
        "c2d_r50_8x8/res3@224",
        "c2d_r50_8x8/res4@224",
        "c2d_r50_128x1/res4@224",
    ),
}


def _cases(layer: Layer) -> list[Case]:
    cases = []
    for size, (frames, height, width) in layer.grids.items():
        name = f"{layer.name}@{size}"
        n = frames * height * width
        m = frames * (height // 2) * (width // 2) if layer.pooled else n
        groups = tuple(group for group, names in GROUPS.items() if name in names)
        for kind in layer.kinds:
            d = {"gaussian": layer.channels, "concat": 1}.get(kind, layer.inner)
            cases.append(Case(name, kind, layer.batch, n, m, d, layer.inner, groups=groups))
    return cases


CASES = tuple(case for layer in LAYERS for case in _cases(layer))


def select_cases(
    patterns: Sequence[str] = ("quick",),
    kinds: Sequence[str] = KINDS,
    batch: int | None = None,
    cases: Sequence[Any] = CASES,
) -> list[Any]:
    """Cases whose name or group matches one of the patterns, in registry order.

    Args:
        patterns: Group words ("acceptance", "long", "quick", "targets"), names, or shell patterns
            of names ("*/res3@224", "*").
        kinds: Affinities to keep.
        batch: Replaces the batch of every case.
        cases: What is selected from; cases of other operations have name, kind, batch and groups.

    Raises:
        ValueError: A pattern or kind matches nothing, or batch < 1.

    Example:
        >>> [(case.n, case.m, case.d) for case in select_cases(["acceptance"], ["softmax"])]
        [(12544, 3136, 256)]
    """
    known = list(dict.fromkeys([*KINDS, *(case.kind for case in cases)]))
    unknown = sorted(set(kinds) - set(known))
    if unknown:
        raise ValueError(f"kinds: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    chosen = []
    for pattern in patterns:
        found = [c for c in cases if pattern in c.groups or fnmatchcase(c.name, pattern)]
        if not found:
            names = ", ".join(dict.fromkeys(case.name for case in cases))
            raise ValueError(
                f"cases: expected a group ({', '.join(GROUPS)}), a name or a pattern of names, "
                f"got {pattern!r}; names are {names}"
            )
        chosen += found
    wanted = [case for case in cases if case in chosen and case.kind in kinds]
    if not wanted:
        raise ValueError(f"cases: none of {', '.join(patterns)} has kind {', '.join(kinds)}")
    return wanted if batch is None else [replace(case, batch=batch) for case in wanted]
