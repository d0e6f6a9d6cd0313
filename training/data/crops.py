"""Which windows of a test frame are looked at, by the integer rules of every published system."""

from dataclasses import dataclass

import torch

from .augment import fixed_places, uniform_int
from .resizing import RULES
from .views import View

# Windows of each kind; "three_random" draws its places.
COUNTS = {"centre": 1, "three": 3, "three_random": 3, "five": 5, "ten": 10, "six_flip": 6}
COUNTS["full"] = 1


@dataclass(frozen=True)
class TestCrops:
    """Windows of test frames.

    ``centre`` and ``three`` (along the longer side) follow the rule of the named system, whose
    orders and offsets differ. ``three_random`` is Tushar-N's, ``five`` and ``ten`` are corners,
    centre and their mirror images (mmaction2, TSM), ``six_flip`` is ``three`` and its mirror images
    (video-nonlocal-net), ``full`` is the whole frame for networks that take any size.

    Args:
        kind: A name of `COUNTS`.
        rule: A name of `resizing.RULES`.
        short_side: Short side of the scaled frames, in pixels.
        size: Height and width of a window, in pixels; ``full`` ignores it.

    Raises:
        ValueError: An unknown name, or a window larger than the short side.

    Example:
        >>> crops = TestCrops("three", "caffe2", short_side=256, size=256)
        >>> [crops.view(256, 340, crop).left for crop in range(3)]
        [0, 42, 84]
    """

    __test__ = False  # not a test, whatever its name makes pytest believe

    kind: str
    rule: str
    short_side: int
    size: int

    def __post_init__(self) -> None:
        for name, legal in (("kind", COUNTS), ("rule", RULES)):
            if getattr(self, name) not in legal:
                raise ValueError(
                    f"test crops: expected {name} from {', '.join(legal)}, got "
                    f"{getattr(self, name)!r}; choose one"
                )
        if self.kind != "full" and not 1 <= self.size <= self.short_side:
            raise ValueError(
                f"test crops: expected 1 <= size <= short_side, got size {self.size} and "
                f"short_side {self.short_side}; make short_side larger"
            )

    def __len__(self) -> int:
        return COUNTS[self.kind]

    def view(
        self, height: int, width: int, crop: int, generator: torch.Generator | None = None
    ) -> View:
        """Window number ``crop`` of decoded frames.

        Args:
            height: Rows of a decoded frame.
            width: Columns of a decoded frame.
            crop: In ``range(len(self))``.
            generator: Source of the places of ``three_random``; the others draw nothing.
        """
        rows, columns = scaled = RULES[self.rule].size(height, width, self.short_side)
        if self.kind == "full":
            return View(scaled, 0, 0, rows, columns)
        mirrored = False
        free = rows - self.size, columns - self.size
        if self.kind == "three":
            top, left = three_places(self.rule, *free)[crop]
        elif self.kind == "six_flip":
            top, left = three_places(self.rule, *free)[crop % 3]
            mirrored = crop >= 3
        elif self.kind == "five":
            top, left = fixed_places(*free, 5)[crop]
        elif self.kind == "ten":
            top, left = fixed_places(*free, 5)[crop // 2]
            mirrored = crop % 2 == 1
        elif self.kind == "three_random":
            top, left = (uniform_int(space, generator) for space in free)
        else:
            top, left = (centre_place(self.rule, space) for space in free)
        return View(scaled, top, left, self.size, self.size, mirrored=mirrored)


def centre_place(rule: str, free: int) -> int:
    """First row or column of a window in the middle.

    Args:
        rule: A name of `resizing.RULES`.
        free: Rows or columns of the frame less those of the window.

    Example:
        >>> [centre_place(rule, 83) for rule in ("caffe2", "slowfast", "tsm")]
        [41, 42, 42]
    """
    if rule == "slowfast":
        return -(-free // 2)
    if rule in ("caffe2", "mmaction"):
        return free // 2
    # torchvision, inception-I3D-NON-LOCAL and MindSpore: halves to the even number.
    return round(free / 2)


def three_places(rule: str, free_rows: int, free_columns: int) -> list[tuple[int, int]]:
    """(top, left) of three windows along the longer side, in the order of the system.

    Args:
        rule: A name of `resizing.RULES`.
        free_rows: Rows of the frame less those of the window.
        free_columns: Columns of the frame less those of the window.

    Example:
        >>> [left for _, left in three_places("mmaction", 0, 84)]
        [0, 84, 42]
    """
    if rule == "caffe2":
        down, right = free_rows // 2, free_columns // 2
        if down > 0:
            # The original moves along the rows wherever they leave room, whichever is longer.
            return [(down * place, right) for place in range(3)]
        return [(down, right * place) for place in range(3)]
    if rule == "slowfast":
        top, left = -(-free_rows // 2), -(-free_columns // 2)
        if free_rows > free_columns:
            return [(0, left), (top, left), (free_rows, left)]
        return [(top, 0), (top, left), (top, free_columns)]
    if rule in ("mmaction", "mindspore"):
        # One side has no room: there these offsets are zero, as the originals insist.
        down, right = free_rows // 2, free_columns // 2
        return [(0, 0), (2 * down, 2 * right), (down, right)]
    # TSM's GroupFullResSample: left, right, centre on a grid of fourths, also of upright frames.
    down, right = free_rows // 4, free_columns // 4
    return [(2 * down, 0), (2 * down, 4 * right), (2 * down, 2 * right)]
