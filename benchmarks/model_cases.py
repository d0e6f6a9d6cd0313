"""The networks whose training step is measured, and the forms in which they are compared.

A case is a network of the zoo in one of the published input settings. The zoo's ResNets have the
stem of 8x8 and 32x4; that of 32x2 and 128x1 has the same weights and halves the frames in the first
convolution and in the first pooling, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nlkernels import set_nonlocal_backend
from nlkernels.models import create_model
from nlkernels.models.resnet import BLOCK_PLACES

from .gpu_train import Amp

CLASSES = 400
DTYPES = ("float32", "bfloat16")
"""bfloat16 is autocast: float32 weights, bfloat16 products."""

VARIANTS = {
    "none": "the network without blocks",
    "naive": "blocks that hold the N x M matrix (backend reference)",
    "fast": "blocks as they are by default (backend auto)",
    "compiled_naive": "torch.compile of the network with naive blocks",
    "grouped_naive": "naive blocks, those of res3 within 4 frames, as the original ran long clips",
}
DEFAULT = tuple(name for name in VARIANTS if name != "grouped_naive")
GROUP = 4
"""Frames of a group of res3, whose scores did not fit else: another function than the others'."""

RES3 = "layer2"


@dataclass(frozen=True)
class Setting:
    """A published input: frames of a clip, and whether the stem halves them twice."""

    frames: int
    strided: bool


SETTINGS = {
    "8x8": Setting(8, strided=False),
    "32x2": Setting(32, strided=True),
    "32x4": Setting(32, strided=False),
    "128x1": Setting(128, strided=True),
}
MODELS = {"i3d_r50": "i3d_r50_8x8", "c2d_r50": "c2d_r50_8x8"}
"""Names on the command line -> names in the zoo."""

COUNTS = tuple(count for count in BLOCK_PLACES if count > 0)
"""Numbers of blocks that the networks have places for."""


@dataclass(frozen=True)
class ModelCase:
    """One network, its input, and its blocks.

    Attributes:
        model: A key of `MODELS`.
        setting: A key of `SETTINGS`.
        size: Height and width of a clip in pixels.
        blocks: Number of non-local blocks.
        kind: Their affinity.
        batch: Clips of a step.
        width: Multiplier of the channels.
    """

    model: str
    setting: str
    size: int
    blocks: int = 5
    kind: str = "softmax"
    batch: int = 1
    width: float = 1.0

    @property
    def name(self) -> str:
        """`<model>_<setting>@<size>`."""
        return f"{self.model}_{self.setting}@{self.size}"

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return SETTINGS[self.setting].frames

    def clip_shape(self, batch: int | None = None) -> tuple[int, ...]:
        """(B, 3, T, H, W)."""
        batch = self.batch if batch is None else batch
        return (batch, 3, self.frames, self.size, self.size)

    def make(self, blocks: bool) -> nn.Module:
        """The network with its blocks, or without."""
        model = create_model(
            MODELS[self.model],
            num_classes=CLASSES,
            width=self.width,
            blocks=self.blocks if blocks else 0,
            block={"kind": self.kind, "init": "default"},
            dropout=0.0,
        )
        if SETTINGS[self.setting].strided:
            model.conv1.stride = (2, 2, 2)
            model.pool1 = nn.MaxPool3d((2, 3, 3), stride=2)
        return model


def select(
    models: Sequence[str],
    settings: Sequence[str],
    sizes: Sequence[int],
    blocks: Sequence[int],
    *,
    kind: str,
    batch: int,
    width: float,
) -> list[ModelCase]:
    """Every combination, models first.

    Raises:
        ValueError: A name that is none, or a number that no network takes.
    """
    check_choice("models", models, tuple(MODELS))
    check_choice("settings", settings, tuple(SETTINGS))
    check_at_least("sizes", sizes, 32, "the networks halve a clip five times")
    check_at_least("blocks", blocks, 1, "the variant none is the network without blocks")
    check_choice("blocks", list(map(str, blocks)), list(map(str, COUNTS)))
    check_at_least("batch", [batch], 1, "it counts the clips of a step")
    if not width > 0:
        raise ValueError(f"width: expected a number above 0, got {width}; 1 is the full width")
    return [
        ModelCase(model, setting, size, count, kind, batch, width)
        for model in models
        for setting in settings
        for size in sizes
        for count in blocks
    ]


def check_choice(what: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    """Raise ValueError unless all are allowed and there is one."""
    unknown = [word for word in given if word not in allowed]
    if unknown or not given:
        said = ", ".join(unknown) or "none"
        raise ValueError(
            f"{what}: expected some of {', '.join(allowed)}, got {said}; name one of these"
        )


def check_at_least(what: str, given: Sequence[int], least: int, why: str) -> None:
    """Raise ValueError unless there is a number and all are at least `least`."""
    if not given or min(given) < least:
        said = ", ".join(map(str, given)) or "none"
        raise ValueError(f"{what}: expected numbers of at least {least}, got {said}; {why}")


def build(case: ModelCase, variant: str, dtype: str, seed: int = 0) -> nn.Module:
    """A network of a case, in training mode; equal weights for equal seeds.

    As the published networks start, every residual branch and every block is the identity, and no
    wrong result would show; so residual branches count a tenth here, blocks a third, and their
    projections start as torch's do. Nothing is dropped: each form would drop other features.

    Args:
        case: The network.
        variant: A key of `VARIANTS`; compiled_naive is not compiled yet.
        dtype: "float32", or "bfloat16" for autocast.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    model = case.make(variant != "none")
    for name, module in model.named_modules():
        if name.endswith(".bn3"):
            nn.init.constant_(module.weight, 0.1)
    for block in named_blocks(model).values():
        unveil(block)
    if variant != "none":
        switch(model, variant)
    if variant == "grouped_naive":
        for block in named_blocks(getattr(model, RES3)).values():
            block.temporal_group = GROUP
    return model if dtype == "float32" else Amp(model)


def unveil(block: nn.Module) -> None:
    """Let a block or gate that starts as the identity count: by a third, or a little."""
    if hasattr(block, "expand"):
        nn.init.normal_(block.expand.weight, std=0.01)
    elif getattr(block.norm, "weight", None) is not None:
        nn.init.constant_(block.norm.weight, 0.3)
    else:
        nn.init.normal_(block.out.weight, std=0.01)


def switch(model: nn.Module, variant: str) -> None:
    """Give the blocks of a model, or a block, the backend of a variant."""
    set_nonlocal_backend(model, "auto" if variant == "fast" else "reference")
    if variant != "fast":
        unfuse(model)


def unfuse(model: nn.Module) -> None:
    """Let blocks run layer by layer."""
    for block in named_blocks(model).values():
        block.fused = False


def named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The non-local blocks of a model by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if getattr(module, "is_nonlocal", False)}


def make_clips(case: ModelCase, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal clips (B, 3, T, H, W) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randn(case.clip_shape(batch), generator=generator)
    return clips, torch.randint(CLASSES, (batch,), generator=generator)
