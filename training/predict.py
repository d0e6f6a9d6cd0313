"""``nlk predict``: what a trained network sees in a video, and where its blocks look.

A video is a file, or a folder of its images: RGB frames, or the flow that a flow network takes.

The video is looked at as in a test: the mean over its views. For a checkpoint of ``nlk train`` the
views are those of its own test, for other weights ten clips in one window each, chosen, scaled and
normalised as their system does; ``data.key=value`` changes that.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from nlkernels.models.classes import read_names

from .attention import Position, Row, attend, find_blocks, strongest
from .config_data import DataConfig, view_side, view_size
from .data.crops import TestCrops
from .data.dataset import Video
from .data.frame_folders import FrameFolder, Naming, guess_template, locate
from .data.openers import FileOpener
from .data.reader import VideoReader, choose_reader
from .data.samplers import Sampler
from .data.samplers_segments import make_sampler
from .data.transforms import TestTransform
from .data.views import View
from .distributed import choose_device, require_one_process
from .overlay import Drawing, Point, Window, files_of, save
from .testing import check_average
from .trained import Trained, load_trained, read_sections
from .view_scores import Average, view_scores

# Points that are drawn where none are asked for.
POINTS = 3


class Guess(NamedTuple):
    """A class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Attention:
    """What has been drawn.

    Attributes:
        png: The sheet.
        gif: The animation.
        clip: Number of the clip.
        points: (t, y, x): frame of the clip, row and column of the video's own frame.
        rows: Where every block looks from every point.
    """

    png: Path
    gif: Path
    clip: int
    points: list[Position]
    rows: list[Row]


@dataclass(frozen=True)
class Prediction:
    """The answer.

    Attributes:
        guesses: The most probable classes, the best first.
        protocol: How it was found.
        attention: What has been drawn, if it was asked for.
    """

    guesses: list[Guess]
    protocol: str
    attention: Attention | None


class _View(NamedTuple):
    """A view of the video and the scores that it was given."""

    clip: int
    indices: list[int]
    crop: View
    scores: Tensor


def predict(
    video: str | Path,
    weights: str | Path,
    *,
    overrides: Sequence[str] = (),
    classes: str | Path | None = None,
    top: int = 5,
    average: Average | None = None,
    attention: str | Path | None = None,
    at: Sequence[Position] = (),
    blocks: Sequence[str] = (),
    clip: int | None = None,
    device: str = "auto",
) -> Prediction:
    """Classify a video, and draw where the blocks look.

    Args:
        video: A video file or a folder of images; of flow in folders u and v either of them. Images
            are named after ``data.template``, that of the network's training, or a published one.
        weights: As `load_trained` reads them.
        overrides: ``data.key=value`` texts: other clips than those of the network's test.
        classes: File with the names of the classes, as ``nlkernels.models.classes.read_names``
            reads it; None takes the names that the weights carry ("classes" of a converted file's
            metadata, or the report beside a checkpoint), and numbers where there are none.
        top: Number of guesses.
        average: ``probabilities`` or ``logits`` of the views; None is what the network's system
            does, see ``view_scores.py``.
        attention: Name of the ``.png`` and the ``.gif`` file to write; None draws nothing.
        at: Points (t, y, x) to look from: frame of the clip, from 0, row and column in the pixels
            of the video's own frames. Without any, the `POINTS` places that the last block changes
            most (`attention.strongest`).
        blocks: Names of the blocks to draw, such as "layer3.1"; without any all of them.
        clip: Number of the clip to draw, from 0; None takes the one that is surest of the answer.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Returns:
        The answer.

    Raises:
        FileNotFoundError: No such video, weights or names, or no folder for the pictures.
        VideoReadError: The video cannot be read.
        ValueError: Names of another number of classes, an unknown block, a point that the network
            does not see, weights that have diverged, or an option that cannot be.

    Example:
        >>> def answer(video):
        ...     found = predict(video, "model.safetensors", classes="kinetics_400.txt", top=1)
        ...     return found.guesses[0].name
    """
    require_one_process()
    check_average(average)
    _check_options(top, attention, at, blocks, clip)
    if not Path(video).exists():
        raise FileNotFoundError(
            f"predict: expected a video or a folder of images, got {video}, no such file; "
            "check the path"
        )
    trained = load_trained(weights, choose_device(device))
    names = _names(trained, classes)
    data = _clips(trained, Path(video), overrides)
    chosen_blocks = {} if attention is None else find_blocks(trained.model, blocks)
    average = trained.average if average is None else average
    sampler = make_sampler(
        data.sampler, frames=data.frames, stride=data.stride, clips=data.test_clips
    )
    windows = TestCrops(data.test_crops, data.crop_rule, view_side(data), view_size(data))
    transform = TestTransform(windows, data.colours, data.channels)
    path = str(video)
    with closing(_open(path, data)) as reader:
        clips = sampler.test_clips(len(reader))
        _check_places(at, data.frames, clip, clips)
        views = list(_views(reader, sampler, transform, trained, average))
        if not views:
            raise ValueError(
                f"predict: expected a video that is long enough for a clip of {data.frames} frames,"
                f" got {len(reader)} frames in {path}; set data.frames, or data.sampler=caffe2"
            )
        mean = torch.stack([view.scores for view in views]).mean(0)
        if not mean.isfinite().all():
            raise ValueError(
                f"predict: expected finite scores, got others from {trained.path}; the weights "
                "have diverged"
            )
        probabilities = mean.softmax(0) if average == "logits" else mean
        best = probabilities.argsort(descending=True, stable=True)[:top].tolist()
        guesses = [Guess(names[place], probabilities[place].item()) for place in best]
        drawn = None
        if attention is not None:
            view = _view_to_draw(views, best[0], average, clip)
            drawn = _draw(
                trained,
                transform,
                reader,
                view,
                points=at,
                blocks=chosen_blocks,
                path=attention,
                title=f"{Path(path).name}: {guesses[0].name}, {guesses[0].probability:.1%}",
            )
    return Prediction(guesses, trained.protocol(data, clips, average), drawn)


def parse_point(text: str) -> Position:
    """A point out of ``t,y,x``.

    Example:
        >>> parse_point("3,120,64")
        (3, 120, 64)
    """
    try:
        t, y, x = (int(number) for number in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"predict: expected --at t,y,x (frame of the clip, row, column), got {text!r}; "
            "write for example --at 3,120,64"
        ) from error
    return t, y, x


def spoken(prediction: Prediction) -> Iterator[str]:
    """A prediction in lines for people."""
    width = max(len(guess.name) for guess in prediction.guesses)
    for guess in prediction.guesses:
        yield f"  {guess.name:<{width}}  {guess.probability:6.1%}"
    yield f"({prediction.protocol})"
    drawn = prediction.attention
    if drawn is None:
        return
    for t, y, x in drawn.points:
        yield f"looked from frame {t} of clip {drawn.clip}, row {y}, column {x}"
    yield f"attention: {drawn.png}, {drawn.gif}"


def _check_options(
    top: int,
    attention: str | Path | None,
    at: Sequence[Position],
    blocks: Sequence[str],
    clip: int | None,
) -> None:
    if top < 1:
        raise ValueError(f"predict: expected at least one guess, got top={top}; raise it")
    if attention is not None:
        files_of(attention)
    elif at or blocks or clip is not None:
        raise ValueError(
            "predict: expected a name for the pictures beside points, blocks or a clip, got none; "
            "add --attention NAME"
        )


def _names(trained: Trained, path: str | Path | None) -> list[str]:
    """Names of a network's classes."""
    names = trained.classes if path is None else read_names(path)
    if names is None:
        return [f"class {number}" for number in range(trained.num_classes)]
    if len(names) != trained.num_classes:
        raise ValueError(
            f"predict: expected the names of the {trained.num_classes} classes of {trained.path}, "
            f"got {len(names)} in {path or trained.path}; pass --classes with the list that it was "
            "trained with"
        )
    return names


def _clips(trained: Trained, video: Path, overrides: Sequence[str]) -> DataConfig:
    """How the network looks at a video."""
    flow = trained.channels == 2
    if flow and not video.is_dir():
        raise ValueError(
            f"predict: expected a folder of flow images for {trained.path}, a network of flow, got "
            f"{video}; extract flow with nlk prepare --flow"
        )
    data: dict[str, Any] = dict(trained.data)
    origins: Mapping[str, str] = {}
    for text in overrides:
        section, _, rest = text.partition(".")
        key, equals, value = rest.partition("=")
        if section != "data" or not equals:
            raise ValueError(
                f"predict: expected overrides of the form data.key=value, got {text!r}; write for "
                "example data.test_clips=10"
            )
        try:
            data[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"predict: expected a YAML value after '=', got {text!r}; put texts in quotes"
            ) from error
        origins = {**origins, f"data.{key}": "the command line"}
    if video.is_dir():
        # As a list of this one video.
        data |= {"kind": "list", "test_list": str(video), "reader": "flow" if flow else "frames"}
        if "template" not in data:
            data["template"] = guess_template(video, flow=flow)
    return read_sections(data=data, origins=origins).data


def _open(path: str, data: DataConfig) -> VideoReader:
    if data.reader not in ("frames", "flow"):
        opener = FileOpener(choose_reader(data.reader), data.decode_timeout_s)
        return opener(0, Video(path, 0))
    naming = Naming(data.template, flow=data.reader == "flow", first=data.first_frame)
    root, name = locate(Path(path), naming)
    return FrameFolder.open(root, name, naming)


def _views(
    reader: VideoReader,
    sampler: Sampler,
    transform: TestTransform,
    trained: Trained,
    average: Average,
) -> Iterator[_View]:
    """All views of a video and their scores, on the CPU."""
    device = trained.model.fc.weight.device
    # Of samplers and crops that draw; the same answer every time.
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for clip in range(sampler.test_clips(len(reader))):
            indices = sampler.test(len(reader), reader.fps, clip, generator)
            frames = reader.frames(indices)
            for number in range(transform.crops):
                crop = transform.view(*frames.shape[1:3], generator, crop=number)
                shown = transform.render(frames, crop)[None].to(device)
                scores = view_scores(trained.model, shown, average)[0].double().cpu()
                yield _View(clip, indices, crop, scores)


def _check_places(at: Sequence[Position], frames: int, clip: int | None, clips: int) -> None:
    """Raise ValueError for a clip, or a frame of a clip, that there is not."""
    if clip is not None and not 0 <= clip < clips:
        raise ValueError(
            f"predict: expected a clip from 0 to {clips - 1}, got {clip}; more clips: "
            "data.test_clips=N"
        )
    for t, _, _ in at:
        if not 0 <= t < frames:
            raise ValueError(
                f"predict: expected a frame of the clip from 0 to {frames - 1}, got {t}; count "
                "frames in the clip and not in the video"
            )


def _view_to_draw(views: Sequence[_View], best: int, average: Average, clip: int | None) -> _View:
    """The view that is surest of the answer, as it is in the video: not mirrored."""

    def sureness(view: _View) -> float:
        scores = view.scores.softmax(0) if average == "logits" else view.scores
        return scores[best].item()

    candidates = [view for view in views if not view.crop.mirrored and clip in (None, view.clip)]
    return max(candidates, key=sureness)


def _draw(
    trained: Trained,
    transform: TestTransform,
    reader: VideoReader,
    view: _View,
    *,
    points: Sequence[Position],
    blocks: dict[str, Any],
    path: str | Path,
    title: str,
) -> Attention:
    """Draw the attention over one clip."""
    frames = reader.frames(view.indices)
    length, height, width = frames.shape[:3]
    window = Window(height, width, view.crop)
    clip = transform.render(frames, view.crop)[None].to(trained.model.fc.weight.device)
    last = list(blocks)[-1]
    if points:
        reasons = ["as asked"] * len(points)
    else:
        found = strongest(trained.model, clip, blocks[last], POINTS)
        points = [(t, *window.shown(y, x)) for (t, y, x), _ in found]
        reasons = [f"{last} changes its features by {change:.0%}" for _, change in found]
    seen = [(t, *window.seen(y, x)) for t, y, x in points]
    rows = attend(trained.model, clip, seen, blocks)
    marked = [
        Point(t, y, x, f"from frame {t}, row {y}, column {x} ({reason})")
        for (t, y, x), reason in zip(points, reasons, strict=True)
    ]
    labels = [f"{n}: {index / reader.fps:.2f} s" for n, index in enumerate(view.indices)]
    drawing = Drawing(_pictures(frames).numpy(), window, marked, rows, title=title, labels=labels)
    step = view.indices[1] - view.indices[0] if length > 1 else 1
    png, gif = save(drawing, path, frame_ms=1000 * abs(step) / reader.fps)
    return Attention(png, gif, view.clip, [tuple(point) for point in points], rows)


def _pictures(frames: Tensor) -> Tensor:
    """Frames to draw on, (T, H, W, 3); flow as red (to the right) and green (down)."""
    if frames.shape[3] == 3:
        return frames
    return torch.cat([frames, torch.full_like(frames[..., :1], 128)], 3)
