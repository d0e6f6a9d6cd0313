"""Decoded frames to network input: random views for training, listed ones for the test."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .augment import Augmentation, draw_mirrored
from .colours import NORMALISATIONS, draw_jitter
from .crops import TestCrops
from .resizing import RULES
from .views import Look, View, render


class Transform(Protocol):
    """What a data set needs: a view for frames of some size, and what to do with it."""

    @property
    def crops(self) -> int:
        """Views per clip."""

    def view(
        self, height: int, width: int, generator: torch.Generator, *, crop: int, label: int
    ) -> View:
        """View number ``crop`` of decoded frames, of a clip of class ``label``."""

    def render(self, video: Tensor, view: View, out: Tensor | None = None) -> Tensor:
        """Frames (T, H, W, C), uint8, to network input (C, T, h, w), float32, in ``out`` if set."""


@dataclass(frozen=True)
class TrainTransform:
    """Random views, the same for all frames of a clip.

    Args:
        augmentation: How frames are scaled and cut.
        flip: Mirror half of the clips; switch it off where left and right are what is learned.
        unflipped: Classes whose clips are never mirrored.
        colours: A name of `colours.NORMALISATIONS`.
        channels: ``rgb`` or ``bgr``.
        jitter: Strengths of changes of brightness, contrast and saturation.

    Example:
        >>> transform = TrainTransform(Augmentation("caffe2", short_side=(8, 10), size=6))
        >>> frames = torch.zeros(4, 12, 16, 3, dtype=torch.uint8)
        >>> view = transform.view(12, 16, torch.Generator(), crop=0, label=0)
        >>> transform.render(frames, view).shape
        torch.Size([3, 4, 6, 6])
    """

    augmentation: Augmentation
    flip: bool = True
    unflipped: frozenset[int] = frozenset()
    colours: str = "grey"
    channels: str = "rgb"
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def crops(self) -> int:
        """Always one."""
        return 1

    def view(
        self, height: int, width: int, generator: torch.Generator, *, crop: int = 0, label: int = 0
    ) -> View:
        """A random view."""
        view = self.augmentation.draw(height, width, generator)
        # Drawn in any case: whether clips are mirrored changes nothing else about them.
        mirrored = draw_mirrored(generator) and self.flip and label not in self.unflipped
        return replace(view, mirrored=mirrored, jitter=draw_jitter(self.jitter, generator))

    def render(self, video: Tensor, view: View, out: Tensor | None = None) -> Tensor:
        """(T, H, W, C) uint8 to (C, T, size, size) float32."""
        look = Look(
            self.augmentation.rule,
            NORMALISATIONS[self.colours],
            self.channels,
            negates_flow=self.augmentation.recipe != "inception",
        )
        return render(video, view, look, out)


@dataclass(frozen=True)
class TestTransform:
    """Listed views.

    Args:
        windows: Which.
        colours: A name of `colours.NORMALISATIONS`.
        channels: ``rgb`` or ``bgr``.

    Example:
        >>> transform = TestTransform(TestCrops("three", "caffe2", short_side=8, size=8))
        >>> transform.crops, transform.view(8, 12, torch.Generator(), crop=2).left
        (3, 4)
    """

    __test__ = False  # not a test, whatever its name makes pytest believe

    windows: TestCrops
    colours: str = "grey"
    channels: str = "rgb"

    @property
    def crops(self) -> int:
        """Windows per clip."""
        return len(self.windows)

    def view(
        self, height: int, width: int, generator: torch.Generator, *, crop: int = 0, label: int = 0
    ) -> View:
        """Window number ``crop``; only ``three_random`` draws from the generator."""
        return self.windows.view(height, width, crop, generator)

    def render(self, video: Tensor, view: View, out: Tensor | None = None) -> Tensor:
        """(T, H, W, C) uint8 to (C, T, h, w) float32."""
        look = Look(RULES[self.windows.rule], NORMALISATIONS[self.colours], self.channels)
        return render(video, view, look, out)
