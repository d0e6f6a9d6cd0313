"""What `nlk bench` is asked for, as cases: shapes that a user types, and registered names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nlkernels.modules.presets import PRESETS

from . import gate, region
from .block_measure import BlockCase, make_block
from .features import FORMATS
from .op_rows import ALL_CASES, OPERATIONS
from .parts import PartCase
from .registry import KINDS, Case

FORMS = {
    **dict.fromkeys(("softmax", "gaussian", "dot_product", "relu"), "B,N,M,D,V"),
    "concat": "B,N,M,V",
    "region": "B,C,T,H,W and --taps KT,KH,KW",
    "gate": "B,C,T,H,W",
    "pool": "B,C,T,H,W and --taps KT,KH,KW",
    "pointwise": "B,N,C,P",
    "norm": "B,N,C,P",
    "block": "B,C,T,H,W",
    "model": "B,C,T,H,W",
}
"""Target -> the sizes that its --shape names."""

ASKED = "asked"
TAPS = (3, 7, 7)
PARTS = {"pool": "8,256,4,28,28", "pointwise": "8,3136,512,256", "norm": "8,3136,256,512"}
"""What blocks are made of -> its size in res3 of a clip of 8 frames."""


def op_cases(kind: str, shape: str | None, taps: str | None, channels_last: bool) -> list[Any]:
    """Problems of an operation.

    Args:
        kind: A key of `FORMS` other than block and model.
        shape: Sizes as `FORMS` has them, the name of a registered problem, or None for the
            smallest registered one.
        taps: Sizes of a region's weight, None is (3, 7, 7); the window of pool, None is (1, 2, 2).
        channels_last: Features in that memory format.

    Raises:
        ValueError: Something else than sizes or a known name, or taps of another operation.

    Example:
        >>> from benchmarks.asked import op_cases
        >>> [(case.n, case.d) for case in op_cases("softmax", "2,64,16,32,32", None, False)]
        [(64, 32)]
    """
    if taps is not None and kind not in ("region", "pool"):
        raise ValueError(f"taps: expected none with {kind}, got {taps}; region and pool have some")
    if kind in PARTS:
        return [_part(kind, shape or PARTS[kind], taps, channels_last)]
    if shape is not None and shape[:1].isdigit():
        return [_typed(kind, shape, taps, channels_last)]
    own = [case for case in ALL_CASES if case.kind == kind]
    if shape is None:
        return [min(own, key=lambda case: case.flop("forward"))]
    found = [case for case in own if case.name == shape]
    if not found:
        names = ", ".join(dict.fromkeys(case.name for case in own))
        raise ValueError(
            f"shape: expected {FORMS[kind]} or a registered problem of {kind}, got {shape!r}; "
            f"registered are {names}"
        )
    return found


def _typed(kind: str, shape: str, taps: str | None, channels_last: bool) -> Any:
    form = FORMS[kind].partition(" ")[0]
    sizes = numbers("shape", shape, form)
    if kind not in OPERATIONS:
        if channels_last:
            raise ValueError(
                f"channels-last: expected features, got {kind}, whose operands are rows; leave it "
                "out, or bench a block"
            )
        b, n, m, d, v = (*sizes[:3], 1, sizes[3]) if kind == "concat" else sizes
        return Case(ASKED, kind, b, n, m, d, v)
    memory_format = list(FORMATS)[channels_last]
    batch, channels, *positions = sizes
    if kind == "gate":
        return gate.GateCase(ASKED, batch, channels, tuple(positions), memory_format)
    weight = TAPS if taps is None else numbers("taps", taps, "KT,KH,KW")
    if any(size % 2 == 0 for size in weight):
        raise ValueError(f"taps: expected odd sizes, got {taps}; a region has a centre")
    return region.RegionCase(ASKED, batch, channels, tuple(positions), tuple(weight), memory_format)


def _part(kind: str, shape: str, taps: str | None, channels_last: bool) -> PartCase:
    if channels_last:
        raise ValueError(f"channels-last: expected none with {kind}, got it; bench a block")
    sizes = tuple(numbers("shape", shape, FORMS[kind].partition(" ")[0]))
    window = (1, 2, 2) if taps is None else tuple(numbers("taps", taps, "KT,KH,KW"))
    if kind == "pool" and any(n < k for n, k in zip(sizes[2:], window, strict=True)):
        raise ValueError(f"taps: expected a window within T,H,W of {shape}, got {taps}; lower it")
    return PartCase(kind, sizes, window)


def block_case(preset: str | None, kind: str | None, shape: str | None) -> BlockCase:
    """A block at the size of an input.

    Args:
        preset: A key of `PRESETS`; None is our own block.
        kind: Affinity; None is the preset's, or softmax.
        shape: B,C,T,H,W; None is res4 of a clip of 8 frames, 1,1024,4,14,14.

    Raises:
        ValueError: Unknown preset or kind, or sizes that no block takes.
    """
    sizes = tuple(numbers("shape", shape or "1,1024,4,14,14", FORMS["block"]))
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    # Built once to be asked, and to let it say what is wrong with its options.
    block = make_block(BlockCase(ASKED, sizes, kind or "", "", preset=preset or ""))
    name = preset or "block"
    return BlockCase(name, sizes, block.kind, block.pool_order, preset=preset or "")


def numbers(what: str, text: str, form: str) -> list[int]:
    """Positive sizes, as many as a form names.

    Raises:
        ValueError: Anything else.
    """
    words, expected = text.split(","), len(form.split(","))
    if len(words) != expected or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"{what}: expected {form}, {expected} sizes above 0, got {text!r}")
    return [int(word) for word in words]


def catalogue(providers: Sequence[str]) -> list[str]:
    """Lines that say what can be asked for.

    Args:
        providers: Of operations, on this machine.
    """
    lines = ["targets, and what --shape names:"]
    lines += [f"  {target:<12} {form}" for target, form in FORMS.items()]
    lines.append("registered problems, which --shape takes by name:")
    by_name: dict[str, list[Any]] = {}
    for case in ALL_CASES:
        by_name.setdefault(case.name, []).append(case)
    for name, cases in by_name.items():
        first = cases[0]
        sizes = (
            f"B={first.batch} N={first.n} M={first.m}"
            if first.kind in KINDS
            else " ".join(f"{letter}={size}" for letter, size in first.shape.items())
        )
        lines.append(f"  {name:<34} {sizes}  {', '.join(case.kind for case in cases)}")
    lines.append(f"presets of block: {', '.join(PRESETS)}")
    lines.append("networks of model: those that nlk models lists")
    lines.append(f"providers here: {', '.join(providers)}")
    return lines
