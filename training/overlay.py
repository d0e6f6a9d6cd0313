"""Attention drawn over the frames of a clip: a sheet (PNG) and an animation (GIF).

The colours say how far the attention to a place lies above its mean over the clip, from there
(nothing is drawn) to the row's strongest place; a row whose strongest place is below twice the mean
stays pale. Negative affinities, which only some kinds of blocks have, are blue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

from .attention import Position, Row, place
from .data.views import View

# Columns of a sheet, and pixels of the longer side of a panel.
COLUMNS = 8
_PANEL = 208
# Pixels of an animation's width, and of the longer side of its panels; most evenly chosen frames.
_GIF_WIDTH, _GIF_PANEL, _GIF_FRAMES = 1200, (112, 320), 16
_GAP, _MARGIN, _LABEL = 4, 10, 176
_TEXT, _LINE = 13, 18
# Of the marked pixel and the ring around it; in other frames of an animation.
MARK, ELSEWHEN = (0, 255, 64), (190, 190, 190)
_LEGEND = (
    "ring: where it is looked from; colour: attention above its mean over the clip, brightest at "
    "the row's peak, pale where it is nearly even; dark: outside of what the network sees"
)
_OUTSIDE, _STRONGEST = 0.35, 0.85
# Peaks below this multiple of the mean say little.
_EVEN = 1.5


@dataclass(frozen=True)
class Window:
    """The part of a decoded frame that a network sees.

    Attributes:
        height: Rows of the decoded frame.
        width: Columns of the decoded frame.
        view: What is cut out of it; not mirrored.
    """

    height: int
    width: int
    view: View

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) in the decoded frame."""
        view = self.view
        down, right = self.height / view.scaled[0], self.width / view.scaled[1]
        return (
            view.top * down,
            view.left * right,
            (view.top + view.height) * down,
            (view.left + view.width) * right,
        )

    def seen(self, y: int, x: int) -> tuple[int, int]:
        """Row and column of the network's input that show a pixel of the decoded frame.

        Raises:
            ValueError: The network does not see the pixel.
        """
        view = self.view
        row = int((y + 0.5) * view.scaled[0] / self.height) - view.top
        column = int((x + 0.5) * view.scaled[1] / self.width) - view.left
        inside = 0 <= y < self.height and 0 <= x < self.width
        if not (inside and 0 <= row < view.height and 0 <= column < view.width):
            top, left, bottom, right = self.box
            raise ValueError(
                f"attention: expected a point that the network sees, rows {top:.0f} to "
                f"{bottom - 1:.0f} and columns {left:.0f} to {right - 1:.0f} of the "
                f"{self.height} x {self.width} pixels (height x width) of a frame, got row {y}, "
                f"column {x}; choose one inside, or data.test_crops=full"
            )
        return row, column

    def shown(self, row: int, column: int) -> tuple[int, int]:
        """The pixel of the decoded frame in the middle of a pixel of the network's input."""
        view = self.view
        y = (row + 0.5 + view.top) * self.height / view.scaled[0]
        x = (column + 0.5 + view.left) * self.width / view.scaled[1]
        return min(int(y), self.height - 1), min(int(x), self.width - 1)


@dataclass(frozen=True)
class Point:
    """A point that is looked from.

    Attributes:
        t: Frame of the clip.
        y: Row of the decoded frame.
        x: Column of the decoded frame.
        title: What is written above its rows.
    """

    t: int
    y: int
    x: int
    title: str


class Drawing:
    """Frames of a clip, points in it, and where blocks look from them.

    Args:
        frames: (T, H, W, 3), uint8.
        window: What the network sees of them.
        points: Points in the frames.
        rows: Of `attention.attend`, for every point and block.
        title: First line of the sheet.
        labels: What to write under each frame, by its number in the clip.
    """

    def __init__(
        self,
        frames: np.ndarray,
        window: Window,
        points: Sequence[Point],
        rows: Sequence[Row],
        *,
        title: str,
        labels: Sequence[str],
    ) -> None:
        self._frames, self._window, self._points = frames, window, points
        self._title, self._labels = title, labels
        self._rows = [[row for row in rows if row.point == one] for one in range(len(points))]
        self._font = ImageFont.load_default(_TEXT)
        self._colours = matplotlib.colormaps["inferno"](np.linspace(0.25, 1, 256))[:, :3] * 255

    def sheet(self) -> Image.Image:
        """All points one below the other: the frames, and below them a row for each block."""
        width, height = self._panel(_PANEL)
        columns = min(COLUMNS, len(self._frames))
        blocks = len(self._rows[0])
        section = 2 * _LINE + (blocks + 1) * (height + _GAP)
        size = (
            2 * _MARGIN + _LABEL + columns * (width + _GAP),
            2 * _MARGIN + 2 * _LINE + len(self._points) * (section + _MARGIN),
        )
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((_MARGIN, _MARGIN), self._title, "black", self._font)
        draw.text((_MARGIN, _MARGIN + _LINE), _LEGEND, "dimgray", self._font)
        top = _MARGIN + 2 * _LINE + _MARGIN // 2
        for point, rows in zip(self._points, self._rows, strict=True):
            draw.text((_MARGIN, top), point.title, "black", self._font)
            shown = spread(len(self._frames), columns, point.t)
            for line, row in enumerate([None, *rows]):
                y = top + 2 * _LINE + line * (height + _GAP)
                self._label(draw, (_MARGIN, y), row)
                for column, number in enumerate(shown):
                    x = _MARGIN + _LABEL + column * (width + _GAP)
                    if line == 0:
                        text = self._labels[number]
                        draw.text((x, y - _LINE), text, "black", self._font)
                    mark = MARK if number == point.t else None
                    panel = self.panel(number, point, row, width, height, mark)
                    sheet.paste(panel, (x, y))
            top += section + _MARGIN
        return sheet

    @property
    def step(self) -> int:
        """Frames of the clip from one picture of the animation to the next."""
        return -(-len(self._frames) // _GIF_FRAMES)

    def animation(self) -> list[Image.Image]:
        """A picture for every frame: a row for each point, a column for each block.

        Of a clip of more than 16 frames, every second, third, ... one, and those of the points.
        """
        blocks = len(self._rows[0])
        longer = min(max(_GIF_WIDTH // blocks, _GIF_PANEL[0]), _GIF_PANEL[1])
        width, height = self._panel(longer)
        size = (
            blocks * (width + _GAP) - _GAP,
            2 * _LINE + len(self._points) * (height + _GAP) - _GAP,
        )
        pictures = []
        chosen = {*range(0, len(self._frames), self.step), *(point.t for point in self._points)}
        for number in sorted(chosen):
            picture, marks = Image.new("RGB", size, "white"), []
            draw = ImageDraw.Draw(picture)
            draw.text((2, 1), f"frame {self._labels[number]}", "black", self._font)
            for line, (point, rows) in enumerate(zip(self._points, self._rows, strict=True)):
                for column, row in enumerate(rows):
                    x, y = column * (width + _GAP), 2 * _LINE + line * (height + _GAP)
                    picture.paste(self.panel(number, point, row, width, height, None), (x, y))
                    across, down = self._spot(point, width, height)
                    marks.append((x + across, y + down, number == point.t))
                    if line == 0:
                        draw.text((x + 2, 1 + _LINE), row.block, "black", self._font)
            pictures.append(_with_palette(picture, marks))
        return pictures

    def panel(
        self,
        number: int,
        point: Point,
        row: Row | None,
        width: int,
        height: int,
        mark: tuple[int, int, int] | None,
    ) -> Image.Image:
        """One frame with the attention of one row over it.

        Args:
            number: Frame of the clip.
            point: Where it is looked from.
            row: Where to; None for the frame alone.
            width: Of the panel, in pixels.
            height: Of the panel, in pixels.
            mark: Colour of the point's pixel and of the ring around it; None marks nothing.
        """
        frame = Image.fromarray(self._frames[number]).resize((width, height), Image.BILINEAR)
        pixels = np.asarray(frame).astype(np.float32)
        down, right = height / self._window.height, width / self._window.width
        top, left, bottom, end = self._window.box
        box = (round(top * down), round(left * right), round(bottom * down), round(end * right))
        if row is not None:
            inside = pixels[box[0] : box[2], box[1] : box[3]].copy()
            pixels *= _OUTSIDE
            strength = self._strength(row, number, inside.shape[:2])
            place_ = (np.abs(strength) * 255).round().astype(int)
            colour = self._colours[place_]
            colour[strength < 0] = colour[strength < 0][:, ::-1]
            alpha = (_STRONGEST * np.abs(strength) ** 0.75)[:, :, None]
            # Half grey, so that the colours of the video and those of the attention stay apart.
            grey = 0.6 * inside.mean(2, keepdims=True) + 0.1 * inside
            pixels[box[0] : box[2], box[1] : box[3]] = grey * (1 - alpha) + colour * alpha
        panel = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
        if mark is not None:
            _mark(panel, *self._spot(point, width, height), mark)
        return panel

    def _spot(self, point: Point, width: int, height: int) -> tuple[int, int]:
        """Column and row of a point in a panel."""
        x = (point.x + 0.5) * width / self._window.width
        y = (point.y + 0.5) * height / self._window.height
        return int(x), int(y)

    def _strength(self, row: Row, number: int, size: tuple[int, int]) -> np.ndarray:
        """(height, width) from -1 to 1: how far above its mean the attention is."""
        weights = row.weights
        plane = weights[place(number, len(self._frames), len(weights))]
        plane = interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)
        mean, strongest = row.mean, abs(row.peak[0])
        above = (plane[0, 0].abs() - mean).clamp_min(0) / max(strongest - mean, mean, 1e-12)
        return (above.clamp_max(1) * torch.sign(plane[0, 0])).numpy()

    def _label(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], row: Row | None) -> None:
        if row is None:
            lines = ["the clip"]
        else:
            weight, (t, _, _) = row.peak
            first, last = span(t, len(row.weights), len(self._frames))
            frames = f"frame {first}" if first == last else f"frames {first}-{last}"
            times = abs(weight) / row.mean if row.mean > 0 else 0.0
            even = ", nearly even" if times < _EVEN else ""
            lines = [
                row.block,
                f"{_by(row.size)} queries",
                f"{_by(row.weights.shape)} keys",
                f"peak {times:.1f}x mean{even}",
                f"in {frames}",
            ]
        draw.multiline_text(at, "\n".join(lines), "black", self._font, spacing=2)

    def _panel(self, longer: int) -> tuple[int, int]:
        """Width and height of a panel."""
        scale = longer / max(self._window.height, self._window.width)
        return round(self._window.width * scale), round(self._window.height * scale)


def save(drawing: Drawing, path: str | Path, *, frame_ms: float) -> tuple[Path, Path]:
    """Write the sheet and the animation.

    Args:
        drawing: What to draw.
        path: ``NAME.png`` and ``NAME.gif`` for ``NAME``, with or without one of these endings.
        frame_ms: Time between two frames of the clip. The animation takes as long, but at least
            100 ms and at most 500 ms for a picture.

    Returns:
        The PNG and the GIF file.
    """
    png, gif = files_of(path)
    drawing.sheet().save(png)
    first, *rest = drawing.animation()
    duration = min(max(100, round(frame_ms * drawing.step)), 500)
    first.save(gif, save_all=True, append_images=rest, duration=duration, loop=0)
    return png, gif


def files_of(path: str | Path) -> tuple[Path, Path]:
    """The PNG and the GIF file of a name.

    Raises:
        FileNotFoundError: No folder for them.
        ValueError: Another ending.

    Example:
        >>> [file.name for file in files_of("attention.png")]
        ['attention.png', 'attention.gif']
    """
    path = Path(path)
    if path.suffix not in ("", ".png", ".gif"):
        raise ValueError(
            f"attention: expected a name for a .png and a .gif file, got {path.name!r}; "
            "leave the ending out"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"attention: expected a folder for {path}, got none at {path.parent}; make it first"
        )
    return path.with_suffix(".png"), path.with_suffix(".gif")


def spread(frames: int, columns: int, always: int) -> list[int]:
    """Frames that a sheet shows: evenly chosen ones, one of them moved to a given one.

    Example:
        >>> spread(32, 4, 12)
        [0, 12, 21, 31]
    """
    chosen = [round(number * (frames - 1) / max(columns - 1, 1)) for number in range(columns)]
    nearest = min(range(columns), key=lambda number: abs(chosen[number] - always))
    chosen[nearest] = always
    return chosen


def span(t: int, size: int, frames: int) -> tuple[int, int]:
    """First and last frame of a clip that lie in a place of a map of fewer frames."""
    inside = [frame for frame in range(frames) if place(frame, frames, size) == t]
    return inside[0], inside[-1]


def _mark(
    panel: Image.Image, x: int, y: int, mark: tuple[int, int, int] | int, black: str | int = "black"
) -> None:
    draw = ImageDraw.Draw(panel)
    for radius, colour in ((8, black), (7, mark), (6, mark), (5, black)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
    draw.point((x, y), mark)


def _with_palette(picture: Image.Image, marks: Sequence[tuple[int, int, bool]]) -> Image.Image:
    """A picture of 256 colours with marks; those of the marks are kept, few as their pixels are."""
    own = (*MARK, *ELSEWHEN, 0, 0, 0)
    free = 256 - len(own) // 3
    colours = picture.quantize(free)
    small = picture.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG)
    palette = small.getpalette()[: 3 * free]
    small.putpalette([*palette, *[0] * (3 * free - len(palette)), *own])
    for x, y, now in marks:
        _mark(small, x, y, free if now else free + 1, free + 2)
    return small


def _by(size: Position) -> str:
    return "x".join(str(one) for one in size)
