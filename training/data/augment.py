"""How training clips are scaled, cut and mirrored: the recipe of every published system.

A recipe draws a `View` for frames of a given size. As with the samplers, the random numbers are not
those of the original programs; what can be drawn, and how often, is the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .resizing import RULES, ResizeRule
from .views import View

# (height, width, generator) to the window, before mirroring.
Draw = Callable[["Augmentation", int, int, torch.Generator], View]


@dataclass(frozen=True)
class Augmentation:
    """A recipe with its sizes.

    Args:
        recipe: A name of `RECIPES`.
        short_side: Smallest and largest short side before cutting, in pixels; recipes that scale to
            one side use the first, those that cut windows of any size (tsm, inception,
            mmaction_slowonly's second step) scale the window itself.
        size: Height and width of the result, in pixels.

    Raises:
        ValueError: No such recipe, or a result larger than a frame can be.

    Example:
        >>> augmentation = Augmentation("caffe2", short_side=(256, 320), size=224)
        >>> view = augmentation.draw(256, 340, torch.Generator().manual_seed(0))
        >>> view.height, view.width
        (224, 224)
    """

    recipe: str
    short_side: tuple[int, int]
    size: int

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(
                f"augmentation: expected one of {', '.join(RECIPES)}, got {self.recipe!r}; "
                "choose one"
            )
        low, high = self.short_side
        if not 1 <= self.size <= low <= high:
            raise ValueError(
                "augmentation: expected 1 <= size <= short_side[0] <= short_side[1], got size "
                f"{self.size} and short_side {self.short_side}; make short_side larger"
            )

    @property
    def rule(self) -> ResizeRule:
        """How the recipe scales frames."""
        return RECIPES[self.recipe][0]

    def draw(self, height: int, width: int, generator: torch.Generator) -> View:
        """A random window of frames of the given size, not yet mirrored.

        Args:
            height: Rows of a decoded frame.
            width: Columns of a decoded frame.
            generator: Source of all random numbers.
        """
        return RECIPES[self.recipe][1](self, height, width, generator)


def draw_mirrored(generator: torch.Generator) -> bool:
    """True for half of the clips."""
    return uniform_int(1, generator) == 1


def uniform_int(largest: int, generator: torch.Generator) -> int:
    """Uniform over 0 to ``largest``, both included."""
    return int(torch.randint(largest + 1, (1,), generator=generator))


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Uniform over low to high."""
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def multi_scale_sizes(
    height: int, width: int, size: int, scales: tuple[float, ...], gap: int
) -> list[tuple[int, int]]:
    """(height, width) of every window that TSM's GroupMultiScaleCrop and mmaction2's can cut.

    Args:
        height: Rows of a frame.
        width: Columns of a frame.
        size: Height and width of the result; window sides within 2 pixels of it become it.
        scales: Window sides as shares of the frame's short side.
        gap: Largest distance of the two scales in the list.

    Example:
        >>> multi_scale_sizes(256, 340, 224, (1, 0.875), 1)
        [(256, 256), (256, 224), (224, 256), (224, 224)]
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    return [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= gap]


def fixed_places(free_rows: int, free_columns: int, places: int) -> list[tuple[int, int]]:
    """(top, left) of 5 or 13 windows on a grid of fourths: TSM's order.

    Args:
        free_rows: Rows of the frame less those of the window.
        free_columns: Columns of the frame less those of the window.
        places: 5 for corners and centre, 13 for eight more.
    """
    down, right = free_rows // 4, free_columns // 4
    grid = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
    if places == 13:
        grid += [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    return [(row * down, column * right) for column, row in grid]


def _centre(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
    rows, columns = recipe.rule.size(height, width, recipe.short_side[0])
    top, left = (rows - recipe.size) // 2, (columns - recipe.size) // 2
    return View((rows, columns), top, left, recipe.size, recipe.size)


def _jittered(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
    """Whole short sides from the first to the last; windows anywhere."""
    low, high = recipe.short_side
    return _anywhere(recipe, height, width, low + uniform_int(high - low, generator), generator)


def _one_side(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
    """The first short side; windows anywhere."""
    return _anywhere(recipe, height, width, recipe.short_side[0], generator)


def _anywhere(
    recipe: Augmentation, height: int, width: int, side: int, generator: torch.Generator
) -> View:
    rows, columns = recipe.rule.size(height, width, side)
    top = uniform_int(rows - recipe.size, generator)
    left = uniform_int(columns - recipe.size, generator)
    return View((rows, columns), top, left, recipe.size, recipe.size)


def _slowfast(inverse: bool) -> Draw:
    def draw(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
        low, high = recipe.short_side
        if inverse:
            side = round(1.0 / uniform(1.0 / high, 1.0 / low, generator))
        else:
            side = round(uniform(low, high, generator))
        rows, columns = recipe.rule.size(height, width, side)
        # The last place is never drawn, as NumPy leaves out the upper end.
        top = uniform_int(max(rows - recipe.size - 1, 0), generator)
        left = uniform_int(max(columns - recipe.size - 1, 0), generator)
        return View((rows, columns), top, left, recipe.size, recipe.size)

    return draw


def _multi_scale(scales: tuple[float, ...], gap: int, places: int, *, scaled: bool) -> Draw:
    """Windows of several sizes at fixed places, of scaled (mmaction2) or decoded frames (TSM)."""

    def draw(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
        first = None
        if scaled:
            first = height, width = recipe.rule.size(height, width, recipe.short_side[0])
        sizes = multi_scale_sizes(height, width, recipe.size, scales, gap)
        rows, columns = sizes[uniform_int(len(sizes) - 1, generator)]
        # A side that was raised to the result's may be larger than a small frame.
        rows, columns = min(rows, height), min(columns, width)
        where = fixed_places(height - rows, width - columns, places)
        top, left = where[uniform_int(places - 1, generator)]
        return View(first, top, left, rows, columns, (recipe.size, recipe.size))

    return draw


def _resized_crop(
    recipe: Augmentation, height: int, width: int, generator: torch.Generator
) -> View:
    """mmaction2's RandomResizedCrop: 8 to 100 % of the area, sides 3:4 to 4:3, ten attempts."""
    height, width = scaled = recipe.rule.size(height, width, recipe.short_side[0])
    for _ in range(10):
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3), generator))
        area = uniform(0.08, 1.0, generator) * height * width
        # Python rounds halves to even, as NumPy does there.
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if rows <= height and columns <= width:
            top = uniform_int(height - rows, generator)
            left = uniform_int(width - columns, generator)
            break
    else:
        rows = columns = min(height, width)
        top, left = (height - rows) // 2, (width - columns) // 2
    return View(scaled, top, left, rows, columns, (recipe.size, recipe.size))


def _corners(recipe: Augmentation, height: int, width: int, generator: torch.Generator) -> View:
    """inception-I3D-NON-LOCAL's MultiScaleCornerCrop: five scales, centre or a corner."""
    # A product of steps, as published: powers may differ in the last digit, and windows by a pixel.
    scale = math.prod([0.84089641525] * uniform_int(4, generator))
    side = int(min(height, width) * scale)
    place = uniform_int(4, generator)
    if place == 0:
        # Half a side either way, so an odd window loses a row and a column.
        half = side // 2
        return View(
            None,
            height // 2 - half,
            width // 2 - half,
            2 * half,
            2 * half,
            (recipe.size, recipe.size),
        )
    top = height - side if place in (3, 4) else 0
    left = width - side if place in (2, 4) else 0
    return View(None, top, left, side, side, (recipe.size, recipe.size))


_FOUR = (1, 0.875, 0.75, 0.66)

RECIPES: dict[str, tuple[ResizeRule, Draw]] = {
    "none": (RULES["caffe2"], _centre),
    "caffe2": (RULES["caffe2"], _jittered),
    "slowfast": (RULES["slowfast"], _slowfast(inverse=False)),
    "slowfast_inverse": (RULES["slowfast"], _slowfast(inverse=True)),
    "pytorchvideo": (RULES["slowfast"], _jittered),
    "mmaction_i3d": (RULES["mmaction"], _multi_scale((1, 0.8), 0, 5, scaled=True)),
    "mmaction_c2d": (RULES["mmaction"], _multi_scale(_FOUR, 1, 5, scaled=True)),
    "mmaction_tsm": (RULES["mmaction"], _multi_scale(_FOUR, 1, 13, scaled=True)),
    "mmaction_slowonly": (RULES["mmaction"], _resized_crop),
    "tsm": (RULES["tsm"], _multi_scale(_FOUR, 1, 13, scaled=False)),
    "tushar": (RULES["tsm"], _one_side),
    "inception": (RULES["inception"], _corners),
    "mindspore": (RULES["mindspore"], _one_side),
}
