"""``nlk predict``: answers with names, and where the blocks look, in numbers and in pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nlkernels import NonLocalBlock3d
from nlkernels._memory import PeakMemory
from nlkernels.cli import main
from nlkernels.models import create_model
from nlkernels.models.weights import save_weights
from nlkernels.training import overlay
from nlkernels.training.attention import Row, attend, find_blocks, place, strongest
from nlkernels.training.data.crops import TestCrops
from nlkernels.training.data.frame_folders import Naming
from nlkernels.training.data.transforms import TestTransform
from nlkernels.training.data.views import View
from nlkernels.training.overlay import MARK, Drawing, Point, Window
from nlkernels.training.predict import predict
from nlkernels.training.trained import load_trained

ONE_CLIP = ["data.test_clips=1"]
OPTIONS = {"num_classes": 3, "width": 0.5, "blocks": 2, "block": {"zero_init": None}}
NAMES = ["arm wrestling", "cleaning pool", "flipping pancake"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    names = {"classes": json.dumps(NAMES)}
    save_weights(path, create_model("c2d_tiny", **OPTIONS), "c2d_tiny", OPTIONS, names)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A generated video of 24 frames of 60 x 80 pixels: a bright square moves to the right."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'nlkernels[video]'")
    path = tmp_path_factory.mktemp("video") / "square.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 60, 80, "yuv420p"
        for number in range(24):
            picture = np.full((60, 80, 3), 40, np.uint8)
            picture[20:36, 2 * number : 2 * number + 16] = (250, 120, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def marked(picture):
    """(row, column) of the middle of what has the colour of the mark."""
    rows, columns = np.nonzero((np.asarray(picture) == MARK).all(2))
    return (rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2


def test_answer_with_names_and_pictures(weights, video, tmp_path, capsys):
    argv = ["predict", str(video), "data.test_clips=3", "--weights", str(weights)]
    argv += ["--attention", str(tmp_path / "map.png"), "--at", "5,30,40", "--clip", "1"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(video)
    assert {line.rsplit(maxsplit=1)[0].strip() for line in lines[1:4]} == set(NAMES)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert lines[4] == "(3 clips x 1 centre crop of 48, probabilities averaged)"
    assert lines[5] == "looked from frame 5 of clip 1, row 30, column 40"
    with Image.open(tmp_path / "map.gif") as animation, Image.open(tmp_path / "map.png") as sheet:
        assert animation.n_frames == 8
        assert animation.info["duration"] == 100
        for number in range(8):
            animation.seek(number)
            green = (np.asarray(animation.convert("RGB")) == MARK).all(2)
            assert green.any() == (number == 5)
        assert sheet.width > 8 * 200 and sheet.format == "PNG"
        # Frame 5 of eight is in the sixth column, in the row of the clip itself and of each block.
        assert (np.asarray(sheet) == MARK).all(2).any(0).nonzero()[0].min() > 5 * 200


def test_rows_are_those_of_the_block_and_sum_to_1(weights, video, tmp_path):
    found = predict(
        video,
        weights,
        overrides=ONE_CLIP,
        attention=tmp_path / "map",
        at=[(0, 30, 40), (7, 12, 20)],
    )
    rows = found.attention.rows
    assert [(row.point, row.block) for row in rows] == [
        (point, block) for point in (0, 1) for block in ("layers.3", "layers.4")
    ]
    for row in rows:
        assert row.size == (8, 6, 6) and row.weights.shape == (8, 3, 3)
        assert row.weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert row.mean == pytest.approx(1 / 72)
    # 60 x 80 becomes 48 x 64, its window starts at column 8, and each place has 8 pixels:
    # (30, 40) is pixel (24, 24) of the window, (12, 20) is (10, 8).
    assert [row.query for row in rows] == [(0, 3, 3)] * 2 + [(7, 1, 1)] * 2


def test_attend_equals_rows_of_the_whole_map():
    block = NonLocalBlock3d(3, inner=4, zero_init=None, temporal_group=2, norm=None)
    nn.init.normal_(block.theta.weight)
    model = nn.Sequential()
    model.add_module("nl", block)
    clip = torch.randn(1, 3, 4, 4, 6)
    _, whole = block(clip, return_map=True)
    points = [(0, 0, 0), (3, 2, 5)]
    rows = attend(model, clip, points, {"nl": block})
    for row, (t, y, x) in zip(rows, points, strict=True):
        assert row.query == (t, y, x)
        expected = whole[0, (t * 4 + y) * 6 + x]
        assert torch.allclose(row.weights.flatten(), expected, atol=1e-6)
        assert row.weights.sum().item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"inside \(4, 4, 6\), got \(4, 0, 0\); count from 0"):
        attend(model, clip, [(4, 0, 0)], {"nl": block})


def test_memory_of_rows_and_never_of_the_matrix():
    block = NonLocalBlock3d(4, inner=4, backend="chunked").eval()
    clip = torch.randn(1, 4, 8, 48, 48)

    class Only(nn.Module):
        """Runs the hooks of the block, which are what is measured, and not the block."""

        def forward(self, x):
            for hook in block._forward_pre_hooks.values():
                hook(block, (x,))

    with PeakMemory() as peak:
        rows = attend(Only(), clip, [(3, 20, 20), (4, 30, 1)], {"nl": block})
    queries, keys = 8 * 48 * 48, 8 * 24 * 24
    assert len(rows) == 2 and rows[0].weights.numel() == keys
    whole_mib = queries * keys * 4 / 2**20
    assert peak.live_mib < whole_mib / 200, (peak.live_mib, whole_mib)


def test_the_strongest_places_are_where_the_block_adds_most():
    class Adds(nn.Module):
        def forward(self, x):
            added = torch.zeros_like(x)
            added[..., 2, 5, 6] = 3
            added[..., 1, 5, 7] = 2.5  # beside a stronger one
            added[..., 0, 2, 2] = 2
            added[..., 3, 0, 3] = 9  # on the rim
            return x + added

    block = Adds()
    found = strongest(nn.Sequential(block), torch.ones(1, 2, 4, 8, 8), block, 2)
    assert [at for at, _ in found] == [(2, 5, 6), (0, 2, 2)]
    assert [change for _, change in found] == pytest.approx([3, 2])


def test_default_points_are_apart_and_inside(weights, video, tmp_path):
    found = predict(video, weights, overrides=ONE_CLIP, attention=tmp_path / "map")
    assert len(found.attention.points) == 3
    places = {row.query[1:] for row in found.attention.rows}
    assert len(places) == 3
    # The network sees columns 10 to 69 of the video.
    assert all(10 <= x < 70 and 0 <= y < 60 for _, y, x in found.attention.points)


@pytest.mark.parametrize("size", [(60, 80), (256, 340), (720, 404)], ids=str)
def test_the_marked_pixel_is_the_asked_one(size):
    height, width = size
    frames = np.full((2, height, width, 3), 90, np.uint8)
    side = min(height, width)
    window = Window(height, width, View((height, width), 0, 0, side, side))
    row = Row("nl", 0, (0, 0, 0), (2, 6, 6), torch.full((2, 3, 3), 1 / 18))
    for y, x in ((0, 0), (side // 2, side // 3), (side - 1, side - 1)):
        point = Point(1, y, x, "")
        drawing = Drawing(frames, window, [point], [row], title="", labels=["0", "1"])
        small = (round(width * 0.5), round(height * 0.5))
        for panel_width, panel_height in ((width, height), small):
            panel = drawing.panel(1, point, row, panel_width, panel_height, MARK)
            asked = int((x + 0.5) * panel_width / width), int((y + 0.5) * panel_height / height)
            assert panel.getpixel(asked) == MARK
            if 8 < asked[0] < panel_width - 8 and 8 < asked[1] < panel_height - 8:
                assert marked(panel) == asked[::-1]


def test_colours_are_where_the_attention_is():
    weights = torch.full((2, 4, 4), 0.2 / 31)
    weights[1, 3, 0] = 0.8
    row = Row("nl", 0, (0, 1, 1), (2, 8, 8), weights)
    frames = np.full((4, 64, 64, 3), 100, np.uint8)
    window = Window(64, 64, View((32, 32), 0, 0, 32, 32))
    point = Point(0, 12, 12, "")
    drawing = Drawing(frames, window, [point], [row], title="", labels=list("0123"))
    panels = [drawing.panel(number, point, row, 64, 64, None) for number in range(4)]
    brightness = [np.asarray(panel).astype(int).sum(2) for panel in panels]
    assert all((one == one[0, 0]).all() for one in brightness[:2])  # key frame 0: nothing
    assert brightness[2].argmax() // 64 >= 48 and brightness[2].argmax() % 64 < 16
    assert row.peak == (pytest.approx(0.8), (1, 3, 0))
    assert overlay.span(1, 2, 4) == (2, 3)


def test_long_clips_are_thinned_out_but_for_the_points():
    frames = np.zeros((40, 16, 16, 3), np.uint8)
    row = Row("nl", 0, (0, 0, 0), (2, 2, 2), torch.full((2, 2, 2), 1 / 8))
    window = Window(16, 16, View((16, 16), 0, 0, 16, 16))
    labels = [str(number) for number in range(40)]
    drawing = Drawing(frames, window, [Point(10, 3, 4, "")], [row], title="", labels=labels)
    assert drawing.step == 3
    assert len(drawing.animation()) == 14 + 1
    assert overlay.spread(40, 8, 10)[2] == 10


def test_window_of_a_frame():
    # 256 x 340 stays as it is, the window is the middle.
    window = Window(256, 340, View((128, 170), 0, 21, 128, 128))
    assert window.box == (0, 42, 256, 298)
    assert window.seen(255, 42) == (127, 0)
    for y, x in ((0, 42), (100, 200), (255, 297)):
        row, column = window.seen(y, x)
        near = window.shown(row, column)
        assert abs(near[0] - y) <= 1 and abs(near[1] - x) <= 1
    with pytest.raises(ValueError, match=r"rows 0 to 255 and columns 42 to 297 .*row 0, column 41"):
        window.seen(0, 41)


def test_places_of_maps():
    assert [place(frame, 5, 2) for frame in range(5)] == [0, 0, 1, 1, 1]
    assert place(31, 32, 4) == 3


def test_names(weights, video, tmp_path, capsys):
    nameless = tmp_path / "nameless.safetensors"
    save_weights(nameless, create_model("c2d_tiny", **OPTIONS), "c2d_tiny", OPTIONS)
    found = predict(video, nameless, top=2, overrides=ONE_CLIP)
    assert len(found.guesses) == 2
    assert {guess.name for guess in found.guesses} < {"class 0", "class 1", "class 2"}
    names = tmp_path / "names.txt"
    names.write_text("x\ny\nz\n")
    found = predict(video, nameless, classes=names, overrides=ONE_CLIP)
    assert {guess.name for guess in found.guesses} == {"x", "y", "z"}
    names.write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"names of the 3 classes of .*, got 2 in .*names.txt"):
        predict(video, nameless, classes=names)


def test_averages_of_logits_are_shown_as_probabilities(weights, video):
    views = ["data.test_clips=2", "data.test_crops=three"]
    found = predict(video, weights, average="logits", overrides=views)
    assert sum(guess.probability for guess in found.guesses) == pytest.approx(1)
    assert found.protocol == "2 clips x 3 crops of 48, logits averaged"


def test_mistakes_are_one_line(weights, video, tmp_path, capsys):
    plain, flow = tmp_path / "plain.safetensors", tmp_path / "flow.safetensors"
    options = {"num_classes": 2, "width": 0.5}
    save_weights(plain, create_model("c2d_tiny", **options), "c2d_tiny", options)
    options = {"num_classes": 2, "width": 0.125}
    name = "inception_nl_flow"
    save_weights(flow, create_model(name, **options), name, options)
    draw = ["--attention", str(tmp_path / "map")]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for arguments, message in (
        ([str(video), "--at", "1,2,3"], "add --attention NAME"),
        ([str(video), "--at", "1,2", *draw], "expected --at t,y,x"),
        ([str(video), "--at", "9,2,3", *draw], "a frame of the clip from 0 to 7, got 9"),
        ([str(video), "--at", "0,2,3", *draw], "a point that the network sees, rows 0 to 59 and"),
        ([str(video), "--clip", "1", *draw], "expected a clip from 0 to 0, got 1"),
        ([str(video), "--block", "layer3.1", *draw], "blocks from layers.3, layers.4, got"),
        ([str(video), "--attention", str(tmp_path / "no" / "map")], "expected a folder for"),
        ([str(video), "--attention", "map.jpg"], "a name for a .png and a .gif file"),
        ([str(video), "--top", "0"], "expected at least one guess"),
        ([str(video), "model.width=2"], "overrides of the form data.key=value"),
        ([str(video), "data.stridee=2"], "did you mean 'data.stride'?"),
        ([str(tmp_path / "broken.mp4")], "expected a video that can be decoded"),
        ([str(tmp_path / "absent.mp4")], "absent.mp4, no such file; check the path"),
        ([str(video), "--weights", str(plain), *draw], "a network with non-local blocks"),
        ([str(video), "--weights", str(flow)], "expected a folder of flow images for"),
        ([str(video), "--weights", str(tmp_path / "no.pt")], "check the path"),
    ):
        path, *rest = arguments
        assert main(["predict", "--weights", str(weights), path, *ONE_CLIP, *rest]) == 2, arguments
        err = capsys.readouterr().err
        assert err.startswith("nlk predict: ") and err.count("\n") == 1, err
        assert message in err


def test_a_folder_of_images_is_as_its_video(weights, tmp_path, capsys):
    template = "{:06d}.png"
    naming = Naming(template)
    pictures = np.random.default_rng(0).integers(0, 255, (9, 60, 80, 3), np.uint8)
    for number, picture in enumerate(pictures):
        (path,) = naming.paths(tmp_path, "run", number)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    argv = ["predict", str(tmp_path / "run"), *ONE_CLIP, "--weights", str(weights)]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "expected RGB images in" in err and "got 000001.png, 000002.png, 000003.png;" in err
    found = predict(
        tmp_path / "run",
        weights,
        overrides=[*ONE_CLIP, f"data.template='{template}'"],
        attention=tmp_path / "map",
        at=[(5, 30, 40)],
    )
    trained = load_trained(weights)
    # Frames 0 to 7, as short as they are, in the middle of the width.
    transform = TestTransform(TestCrops("centre", "caffe2", 48, 48), "grey", "rgb")
    frames = torch.from_numpy(pictures[:8])
    view = transform.view(60, 80, torch.Generator(), crop=0)
    clip = transform.render(frames, view)[None]
    expected = trained.model(clip).softmax(1)[0]
    best = expected.argmax().item()
    assert found.guesses[0].name == NAMES[best]
    assert found.guesses[0].probability == pytest.approx(expected[best].item(), abs=1e-6)
    assert found.attention.png.is_file()


def test_flow_is_predicted_from_its_folders(tmp_path):
    torch.manual_seed(0)
    weights, options = (
        tmp_path / "flow.safetensors",
        {"num_classes": 3, "width": 0.125, "blocks": 2},
    )
    save_weights(
        weights, create_model("inception_nl_flow", **options), "inception_nl_flow", options
    )
    naming = Naming("frame{:06d}.jpg", flow=True)
    generator = np.random.default_rng(0)
    for number in range(12):
        for path in naming.paths(tmp_path, "run", number):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (40, 56), np.uint8)).save(path)
    small = ["data.frames=8", "data.size=32", "data.short_side=[32, 32]", "data.test_size=32"]
    found = [
        predict(
            tmp_path / axis / "run",
            weights,
            overrides=small,
            attention=tmp_path / "map" if axis == "u" else None,
        )
        for axis in "uv"
    ]
    assert found[0].guesses == found[1].guesses
    # Windows of 8 frames from 0 and 8 on.
    assert found[0].protocol == "2 clips x 1 centre crop of 32, probabilities averaged"
    assert found[0].attention.png.is_file()


def test_a_real_clip(weights, shared_videos, tmp_path):
    video = shared_videos / "flipping_pancake.mkv"
    views = ["data.stride=4", "data.test_clips=2"]
    found = predict(video, weights, overrides=views, attention=tmp_path / "map", at=[(2, 120, 213)])
    assert {guess.name for guess in found.guesses} == set(NAMES)
    for row in found.attention.rows:
        assert row.weights.sum().item() == pytest.approx(1, abs=1e-5)
    with Image.open(found.attention.png) as sheet:
        rows, columns = np.nonzero((np.asarray(sheet.convert("RGB")) == MARK).all(2))
    # The mark of each of the three rows: in the middle of the third panel of 208 pixels and a gap.
    left = 10 + 176 + 2 * (208 + 4)
    middle = (columns.min() + columns.max()) / 2
    assert middle == left + int(213.5 * 208 / 426)
    assert len(np.unique(rows)) > 3


def test_blocks_of_a_network():
    model = create_model("c2d_tiny", num_classes=2, blocks=2)
    assert list(find_blocks(model, ["layers.4.nl"])) == ["layers.4"]
