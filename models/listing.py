"""`nlk models`: every registered network with its costs, its published results and its licence."""

from collections.abc import Iterator
from typing import Any

from nlkernels._spec import nearest
from nlkernels.models.costs import costs
from nlkernels.models.registry import list_models
from nlkernels.models.zoo import Input, Record, Result, describe

# Multiply-adds "published" are those of the system's own counter, "executed" what runs here.
_HEADER = "  blocks                   parameters   published    executed   top-1   top-5"


def listing(pattern: str = "*") -> Iterator[str]:
    """Lines of text on the networks whose names match, one after the other as they are reckoned.

    Args:
        pattern: shell-style pattern, such as "i3d*".

    Raises:
        ValueError: no network has such a name.

    Example:
        >>> from nlkernels.models.listing import listing
        >>> lines = list(listing("i3d_r50_8x8"))
        >>> lines[0]
        'i3d_r50_8x8  i3d of caffe2; 8 frames, every 8th; 224 px, tested at 256'
        >>> lines[4]
        '  5 softmax                    35.40M      36.24G      36.24G    74.7    91.6'
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(
            f"expected a pattern of names of models, got {pattern!r}, which none has"
            f"{nearest(pattern, list_models(), 'nlk models without a pattern lists all')}"
        )
    for name in names:
        yield from _lines(describe(name))


def _lines(record: Record) -> Iterator[str]:
    owner = f"{record.family} of {record.system}" if record.system else record.family
    yield f"{record.name}  {owner}; {_spoken(record.input)}"
    if record.source is not None:
        yield f"  {record.source}; {record.licence}"
    yield _HEADER
    if not any(result.blocks == 0 for result in record.results):
        yield _row(record, Result(0, None, None, None, ""))
    for result in record.results:
        yield _row(record, result)
    for protocol in dict.fromkeys(each.protocol for each in record.results):
        yield f"  Kinetics-400: {protocol}"
    yield ""


def _spoken(clip: Input) -> str:
    if clip.stride is None:
        drawn = "from segments"
    else:
        drawn = "all" if clip.stride == 1 else f"every {clip.stride}{_ordinal(clip.stride)}"
    return f"{clip.frames} frames, {drawn}; {clip.size} px, tested at {clip.test_size}"


def _ordinal(number: int) -> str:
    return {2: "nd", 3: "rd"}.get(number, "th")


def _row(record: Record, result: Result) -> str:
    options: dict[str, Any] = {"blocks": result.blocks}
    options |= {} if result.kind is None else {"block": {"kind": result.kind}}
    found = costs(record.name, record.input.frames, record.input.size, **options)
    numbers = [f"{found.parameters / 1e6:.2f}M"]
    numbers += [f"{each / 1e9:.2f}G" for each in (found.published, found.executed)]
    accuracies = ["" if each is None else f"{each:g}" for each in (result.top1, result.top5)]
    label = " ".join(filter(None, (str(result.blocks), result.kind, result.recipe)))
    return (
        f"  {label:<22}{numbers[0]:>13}{numbers[1]:>12}{numbers[2]:>12}"
        f"{accuracies[0]:>8}{accuracies[1]:>8}"
    ).rstrip()
