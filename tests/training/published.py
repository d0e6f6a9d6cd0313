"""What is published of every packaged configuration: by recipe, and by the name of the file."""

import math
from typing import NamedTuple

# Steps of a pass in the tests of schedules by epoch.
PASS = 100


class Recipe(NamedTuple):
    """What trainings of one kind have in common."""

    batch: int
    steps: int
    """Length of the training; by epochs, of ``PASS`` steps each."""
    rates: dict[int, float]
    """Learning rates of first and last step, and on both sides of what changes them."""
    groups: set[tuple[str, float, float]]
    """Parameter groups: name, factor of the rate, weight decay."""
    clip: float | None = None
    nesterov: bool = False
    dampening: float = 0.0


def _parts(lr, first, second, end):
    """Rates of three parts, each a tenth of the one before."""
    return {
        0: lr,
        first - 1: lr,
        first: lr / 10,
        second - 1: lr / 10,
        second: lr / 100,
        end - 1: lr / 100,
    }


def _cosine(lr, progress):
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def _caffe2(batch, lr, *ends, affine=False):
    groups = {("weights and biases", 1, 1e-4), ("norms", 1, 0)}
    if affine:
        groups.remove(("norms", 1, 0))  # they are factors, which are not trained
    return Recipe(batch, ends[-1], _parts(lr, *ends), groups, nesterov=True)


def _all(batch, epochs, rates, decay=1e-4, **more):
    return Recipe(batch, epochs * PASS, rates, {("all", 1, decay)}, **more)


def _fast(decay):
    """Groups of TSM."""
    return {
        ("weights", 1, decay),
        ("biases", 2, 0),
        ("norms", 1, 0),
        ("fast weights", 5, decay),
        ("fast biases", 10, 0),
    }


def _rnl(decay, epochs, warmup):
    last = _cosine(0.02, (epochs - 1 / PASS - warmup) / (epochs - warmup))
    rates = {0: 0.002, warmup * PASS // 2: 0.011, warmup * PASS: 0.02, epochs * PASS - 1: last}
    groups = {*_fast(decay), ("block weights", 1, decay), ("block biases", 2, 0)}
    return Recipe(64, epochs * PASS, rates, groups, clip=20)


def _mindspore(epochs):
    rates = {0: 3e-6, 99: 3e-4, 100: _cosine(3e-4, 0.01)}
    return _all(48, epochs, rates | {epochs * PASS - 1: _cosine(3e-4, (epochs - 1) / 100)})


_SLOWFAST = {("weights and biases", 1, 1e-4), ("norms", 1, 0)}
RECIPES = {
    "c2-400k": _caffe2(64, 0.01, 150_000, 300_000, 400_000),
    "c2-300k": _caffe2(64, 0.01, 150_000, 250_000, 300_000),
    "c2-600k-4": _caffe2(32, 0.005, 300_000, 500_000, 600_000),
    "c2-300k-4": _caffe2(32, 0.005, 150_000, 250_000, 300_000),
    "c2-affine": _caffe2(16, 0.0025, 150_000, 300_000, 400_000, affine=True),
    "mm-c2d": _all(256, 100, _parts(0.01, 4000, 8000, 10_000), clip=40),
    "mm-i3d": _all(64, 100, _parts(0.01, 4000, 8000, 10_000), clip=40),
    # Milestones of a MultiStepLR with begin=10; warm-up from epoch to epoch.
    "mm-slowonly": _all(
        128,
        150,
        _parts(0.01, 10_000, 14_000, 15_000)
        | {0: 0.001, 99: 0.001, 100: 0.002, 899: 0.009, 900: 0.01, 999: 0.01},
        clip=40,
    ),
    "mm-tsm": Recipe(
        128,
        5000,
        _parts(0.02, 2500, 4500, 5000)
        | {0: 0.002, 99: 0.002, 100: 0.0065, 399: 0.0155, 400: 0.02, 499: 0.02},
        _fast(1e-4),
        clip=20,
    ),
    "tsm": Recipe(128, 10_000, _parts(0.02, 4000, 8000, 10_000), _fast(1e-4), clip=20),
    "rnl-k400": _rnl(2e-4, 100, 5),
    "rnl-sthv1": _rnl(1e-3, 50, 1),
    "inception": _all(8, 2000, {0: 1e-3, 199_999: 1e-3}, 1e-3, dampening=0.9),
    "ms": _mindspore(5),
    "mindvideo": _mindspore(100),
    "sf": Recipe(
        64,
        19_600,
        {0: 0.01, 3400: _cosine(0.1, 34 / 196), 19_599: _cosine(0.1, 195.99 / 196)},
        _SLOWFAST,
        nesterov=True,
    ),
    "sf-in1k": Recipe(64, 11_800, _parts(0.01, 4400, 8800, 11_800), _SLOWFAST, nesterov=True),
}

# Parameters: exact numbers, and printed ones where no more is published.
C2D, I3D, NL, NL_AFFINE, NL_PLAIN = 24_327_632, 28_043_472, 7_358_464, 7_350_272, 7_354_368
RNL = C2D + 3_801_088 + 263_937
INCEPTION = 12_317_587 + 989_552
# A row of the classifier; Something-Something V1 has 174 classes.
CLASS = 2049

CONFIGS = {
    "c2_c2d_r50_8x8_400k": (C2D, "c2-400k"),
    "c2_c2d_r50_nl_8x8_400k": (C2D + NL, "c2-400k"),
    "c2_i3d_r50_8x8_400k": (I3D, "c2-400k"),
    "c2_i3d_r50_nl_8x8_400k": (I3D + NL, "c2-400k"),
    "c2_c2d_r50_32x2_400k": (C2D, "c2-400k"),
    "c2_c2d_r50_nl_32x2_400k": (C2D + NL, "c2-400k"),
    "c2_i3d_r50_32x2_400k": (I3D, "c2-400k"),
    "c2_i3d_r50_nl_32x2_400k": (I3D + NL, "c2-400k"),
    "c2_i3d_r50_8x8_300k": (I3D, "c2-300k"),
    "c2_i3d_r50_8x8_600k_4gpu": (I3D, "c2-600k-4"),
    "c2_i3d_r50_8x8_300k_4gpu": (I3D, "c2-300k-4"),
    "c2_i3d_r50_32x4_affine_400k": (I3D, "c2-affine"),
    "c2_i3d_r50_nl_32x4_affine_400k": (I3D + NL_AFFINE, "c2-affine"),
    "c2_i3d_r50_128x1_affine_400k": (I3D, "c2-affine"),
    "c2_i3d_r50_nl_128x1_affine_400k": (I3D + NL_AFFINE, "c2-affine"),
    "mmaction_c2d_nopool_r50_8x8_100e": ("24.3M", "mm-c2d"),
    "mmaction_c2d_nopool_r101_8x8_100e": ("43.3M", "mm-c2d"),
    "mmaction_c2d_r50_8x8_100e": ("24.3M", "mm-c2d"),
    "mmaction_c2d_r50_16x4_100e": ("24.3M", "mm-c2d"),
    "mmaction_i3d_r50_32x2_100e": ("28.0M", "mm-i3d"),
    "mmaction_i3d_r50_dense_32x2_100e": ("28.0M", "mm-i3d"),
    "mmaction_i3d_heavy_r50_32x2_100e": ("33.0M", "mm-i3d"),
    "mmaction_i3d_r50_nl_dot_product_32x2_100e": (I3D + NL_PLAIN, "mm-i3d"),
    "mmaction_i3d_r50_nl_embedded_gaussian_32x2_100e": (I3D + NL_PLAIN, "mm-i3d"),
    "mmaction_i3d_r50_nl_gaussian_32x2_100e": (I3D + 3_680_256, "mm-i3d"),
    "mmaction_slowonly_r50_nl_4x16_150e": ("39.81M", "mm-slowonly"),
    "mmaction_slowonly_r50_nl_8x8_150e": ("39.81M", "mm-slowonly"),
    "mmaction_tsm_r50_nl_dot_product_8f_50e": ("31.68M", "mm-tsm"),
    "mmaction_tsm_r50_nl_embedded_gaussian_8f_50e": ("31.68M", "mm-tsm"),
    "mmaction_tsm_r50_nl_gaussian_8f_50e": ("28.0M", "mm-tsm"),
    "tsm_r50_nl_8f_100e": ("31.7M", "tsm"),
    "rnl_tsm_r50_k400_8f_100e": (RNL, "rnl-k400"),
    "rnl_tsm_r50_k400_16f_100e": (RNL, "rnl-k400"),
    "rnl_tsm_r50_sthv1_8f_50e": (RNL - 226 * CLASS, "rnl-sthv1"),
    "rnl_tsm_r50_sthv1_16f_50e": (RNL - 226 * CLASS, "rnl-sthv1"),
    "inception_nl_flow_hmdb51": (INCEPTION, "inception"),
    # A third input channel of the 64 kernels of 7 x 7 x 7.
    "inception_nl_rgb_hmdb51": (INCEPTION + 64 * 7**3, "inception"),
    "mindspore_i3d_r50_nl_32x6_5e": (I3D + NL_PLAIN, "ms"),
    "mindvideo_i3d_r50_nl_32x6_100e": (I3D + NL_PLAIN, "mindvideo"),
    "slowfast_c2d_r50_nl_8x8_196e": (C2D + NL, "sf"),
    "slowfast_i3d_r50_nl_8x8_196e": (I3D + NL, "sf"),
    "slowfast_c2d_r50_nl_8x8_in1k_118e": (C2D + NL, "sf-in1k"),
    "slowfast_i3d_r50_nl_8x8_in1k_118e": (I3D + NL, "sf-in1k"),
}
# Top-1 that the zoo, which is of Kinetics-400 and 8 frames of these networks, does not have.
ACCURACIES = {
    "rnl_tsm_r50_k400_16f_100e": 77.2,
    "rnl_tsm_r50_sthv1_8f_50e": 49.5,
    "rnl_tsm_r50_sthv1_16f_50e": 51.0,
}
UNPUBLISHED = {
    *("inception_nl_flow_hmdb51", "inception_nl_rgb_hmdb51", "mindvideo_i3d_r50_nl_32x6_100e"),
    *("slowfast_c2d_r50_nl_8x8_196e", "slowfast_c2d_r50_nl_8x8_in1k_118e"),
}
OF_RECIPES = {
    "c2_i3d_r50_8x8_300k": "300k",
    "c2_i3d_r50_8x8_600k_4gpu": "4 GPUs, 600k",
    "c2_i3d_r50_8x8_300k_4gpu": "4 GPUs, 300k",
    "mmaction_i3d_r50_dense_32x2_100e": "dense",
}


# Format of the lists, sampler, augmentation, short side and colours, by the beginning of the name.
_IMAGENET = ((256, 256), "imagenet")
_CLIPS = {
    "c2_": ("caffe2", "caffe2", "caffe2", (256, 320), "grey"),
    "c2_i3d_r50_8x8_300k_4gpu": ("caffe2", "caffe2", "caffe2", (256, 256), "grey"),
    "mmaction_c2d": ("mmaction", "mmaction", "mmaction_c2d", *_IMAGENET),
    "mmaction_i3d": ("mmaction", "mmaction", "mmaction_i3d", *_IMAGENET),
    "mmaction_i3d_r50_dense": ("mmaction", "mmaction_dense", "mmaction_i3d", *_IMAGENET),
    "mmaction_slowonly": ("mmaction", "mmaction", "mmaction_slowonly", *_IMAGENET),
    "mmaction_tsm": ("mmaction", "mmaction_segments", "mmaction_tsm", *_IMAGENET),
    "tsm_": ("tsm", "tsm_dense", "tsm", *_IMAGENET),
    "rnl_tsm_r50_k400": ("rnl", "tsm_dense", "tsm", *_IMAGENET),
    "rnl_tsm_r50_sthv1": ("tsm", "tsm_twice", "tsm", *_IMAGENET),
    "inception_nl_flow": (
        "hmdb51_json",
        "inception_val",
        "inception",
        (224, 224),
        "flow_inception",
    ),
    "inception_nl_rgb": ("hmdb51_json", "inception_val", "inception", (224, 224), "unit"),
    "mind": ("kinetics_csv", "mindspore", "mindspore", (256, 256), "mindspore"),
    "slowfast": ("pyslowfast", "slowfast", "slowfast", (256, 320), "grey"),
}
_DROPOUT = {
    "": 0.5,
    "c2_i3d_r50_8x8_300k_4gpu": 0.0,
    "mmaction_c2d_nopool": 0.4,
    "rnl_tsm_r50_sthv1": 0.8,
    "mindvideo": 0.0,
}


def clips_of(name: str) -> tuple:
    """What is published of the clips of a configuration."""
    return _CLIPS[max(filter(name.startswith, _CLIPS), key=len)]


def dropout_of(name: str) -> float:
    """The published dropout probability of a configuration."""
    return _DROPOUT[max(filter(name.startswith, _DROPOUT), key=len)]
