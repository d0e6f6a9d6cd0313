"""nlk convert: every system's files in and out, and one clear error where weights do not fit."""

import json

import pytest
import torch

from nlkernels import cli
from nlkernels.models import create_model, files
from nlkernels.models.conversion import FORMS, convert, parse_options
from nlkernels.models.convert import export_foreign
from nlkernels.models.fitting import fitting
from nlkernels.models.systems import SYSTEMS
from nlkernels.models.weights import load_weights, save_weights
from tests.models.files.test_caffe2 import equal

WIDTH = 0.125
# A network of each system, and whether its weights show which one it is.
NETWORKS = {
    "caffe2": ("i3d_r50_8x8", 5, False),
    "tushar": ("tushar_i3d_r50_32x2", 5, True),
    "slowfast": ("slowfast_i3d_r50_8x8", 5, True),
    "pytorchvideo": ("pytorchvideo_c2d_r50_8x8", 0, True),
    "mindspore": ("mindspore_i3d_r50_32", 5, True),
    "mmaction": ("mmaction_i3d_r50_32x2", 5, True),
    "rnl": ("rnl_tsm_r50", 5, True),
    "tsm": ("tsm_r50", 5, True),
    "inception_nl": ("inception_nl_rgb", 2, True),
    "hassony2": ("hassony2_i3d_rgb", 0, False),
    "piergiaj": ("piergiaj_i3d_rgb", 0, True),
}


def few(cases, but):
    """Cases of which some try all networks of a large system: half a minute, so they are gates."""
    return [pytest.param(each, marks=pytest.mark.gate if each in but else ()) for each in cases]


def network(system):
    name, blocks, _ = NETWORKS[system]
    torch.manual_seed(3)
    return create_model(name, num_classes=6, width=WIDTH, blocks=blocks).eval()


def checkpoint(folder, system, **changes):
    """A file as that system saves it."""
    form = FORMS[system]
    state = {form.prefix + key: value for key, value in export_foreign(network(system)).items()}
    path = folder / f"{system}.checkpoint"
    files.write(path, {**state, **changes}, {"epoch": 7}, format=form.format, entry=form.entry)
    return path


def nlk(capsys, *argv):
    code = cli.main(["convert", *map(str, argv), "--option", f"width={WIDTH}"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_system_has_a_form_and_a_network_here():
    assert FORMS.keys() == SYSTEMS.keys() == NETWORKS.keys() | {"torchvision"}


@pytest.mark.parametrize("system", NETWORKS)
def test_there_and_back(capsys, tmp_path, system):
    """The file of a system becomes ours, and ours that system's again, equal in every key."""
    path, ours, back = checkpoint(tmp_path, system), tmp_path / "m.safetensors", tmp_path / "back"
    name, blocks, _ = NETWORKS[system]
    code, out, err = nlk(capsys, path, ours, "--model", name)
    assert (code, err) == (0, "")
    source = files.read(path)
    counts = "0 expected new, 0 unexpected, 0 missing"
    assert f"keys of {system}: {len(source.state)} matched, {counts}" in out
    model = load_weights(ours)
    assert equal(model.state_dict(), network(system).state_dict())
    found = files.read(ours)
    assert found.metadata["system"] == system
    assert all(found.metadata[key] for key in ("source", "licence", "protocol"))
    assert json.loads(found.metadata["options"])["blocks"] == blocks
    assert convert(ours, back, to=system).endswith(f"as {system} keeps them")
    assert equal(files.read(back).state, source.state)
    assert files.read(back).format == source.format
    assert files.read(back).entry == source.entry


def test_what_is_known_of_weights_goes_with_them(tmp_path):
    """No accuracy is claimed for them: they have 6 classes and an eighth of the channels."""
    target, options = tmp_path / "m.safetensors", {"width": WIDTH}
    out = convert(checkpoint(tmp_path, "caffe2"), target, name="i3d_r50_8x8", options=options)
    assert "taken as softmax, --option block.kind=dot_product takes the other" in out
    metadata = files.read(target).metadata
    assert metadata["source"] == "github.com/facebookresearch/video-nonlocal-net"
    assert metadata["licence"] == "repository: CC-BY-NC-4.0; weights: not stated"
    assert metadata["protocol"] == "none published for these weights"
    assert not {"published", "candidates", "class_order"} & metadata.keys()
    assert metadata["source.epoch"] == "7"
    assert metadata["file"] == "caffe2.checkpoint"


@pytest.mark.parametrize("system", NETWORKS)
def test_from_one_system_to_itself_keeps_dtypes(tmp_path, system):
    form, name = FORMS[system], NETWORKS[system][0]
    state = export_foreign(network(system))
    state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    files.write(tmp_path / "half", state, format=form.format, entry=form.entry)
    options = {"width": WIDTH}
    convert(tmp_path / "half", tmp_path / "back", to=system, name=name, options=options)
    assert equal(files.read(tmp_path / "back").state, state)


@pytest.mark.parametrize("system", few(NETWORKS, but=("caffe2", "slowfast")))
def test_networks_are_found_by_their_weights(system):
    name, blocks, alone = NETWORKS[system]
    found = fitting(export_foreign(network(system)), width=WIDTH)
    assert name in [fit.name for fit in found]
    assert all(fit.options["num_classes"] == 6 for fit in found)
    assert {fit.options["blocks"] for fit in found} == {blocks}
    if alone and system not in ("slowfast", "mmaction"):
        assert len(found) == 1


@pytest.mark.parametrize("kind", ["gaussian", "concat"])
def test_kinds_that_keys_show_are_found(kind):
    options = {"num_classes": 6, "width": WIDTH, "blocks": 5, "block": {"kind": kind}}
    state = export_foreign(create_model("mmaction_i3d_r50_32x2", **options))
    assert fitting(state, name="mmaction_i3d_r50_32x2", width=WIDTH)[0].options == options


def test_several_networks_are_named(capsys, tmp_path):
    code, out, err = nlk(capsys, checkpoint(tmp_path, "caffe2"), tmp_path / "m.safetensors")
    assert (code, out) == (2, "")
    assert "so choose: --model i3d_r50_32x2, --model i3d_r50_8x8" in err
    assert err.count("\n") == 1


def test_ports_of_the_same_keys_are_named(capsys, tmp_path):
    """Without blocks two ports of Inception-I3D differ in padding and epsilon alone."""
    path, target = checkpoint(tmp_path, "hassony2"), tmp_path / "m.safetensors"
    code, out, err = nlk(capsys, path, target)
    assert (code, out) == (2, "")
    assert "padding and clips, so choose: --model hassony2_i3d_rgb, --model inception_nl_rgb" in err
    assert not target.exists()
    for name in ("hassony2_i3d_rgb", "inception_nl_rgb"):
        assert nlk(capsys, path, target, "--model", name)[0] == 0
        assert files.read(target).metadata["model"] == name
    assert nlk(capsys, path, target, "--from", "hassony2")[0] == 0
    assert files.read(target).metadata["model"] == "hassony2_i3d_rgb"


WRONG = {
    "another-network": (
        "i3d_r101_8x8",
        "the weights fit --model i3d_r50_32x2, --model i3d_r50_8x8",
    ),
    "another-kernel": ("c2d_r50_8x8", "wrong shape (10): conv1_w (8, 3, 5, 7, 7), not (8, 3, 1"),
    "affine": ("i3d_r50_32x4", "unexpected (116): res_conv1_bn_rm"),
    "unknown": ("i3d_r50_8x9", "did you mean 'i3d_r50_8x8'?"),
}


@pytest.mark.parametrize("wrong", few(WRONG, but=("another-kernel", "affine")))
def test_the_wrong_model_is_refused_and_nothing_written(capsys, tmp_path, wrong):
    name, part = WRONG[wrong]
    path, target = checkpoint(tmp_path, "caffe2"), tmp_path / "m.safetensors"
    target.write_bytes(b"as it was")
    code, out, err = nlk(capsys, path, target, "--model", name)
    assert (code, out) == (2, "")
    assert err.startswith("nlk convert: ")
    assert err.count("\n") == 1
    assert part in err
    assert target.read_bytes() == b"as it was"


@pytest.mark.parametrize(
    "system",
    few(
        ["caffe2", "tsm", "mmaction", "slowfast", "mindspore", "tushar"],
        but=("caffe2", "slowfast", "mmaction"),
    ),
)
def test_a_missing_block_is_named(capsys, tmp_path, system):
    form = FORMS[system]
    state = export_foreign(network(system))
    marks = ("nonlocal_conv4_3_", "layer3.2.nl.", "layer3.3.n", "s4.pathway0_nonlocal3.")
    lost = [key for key in state if any(mark in key for mark in marks)]
    assert lost
    kept = {form.prefix + key: value for key, value in state.items() if key not in lost}
    path, target = tmp_path / "model", tmp_path / "m.safetensors"
    files.write(path, kept, format=form.format, entry=form.entry)
    code, _, err = nlk(capsys, path, target, "--model", NETWORKS[system][0])
    assert code == 2
    needed = [key for key in lost if not key.endswith("num_batches_tracked")]
    assert f"missing ({len(needed)}): {needed[0]}" in err
    assert "unexpected (" not in err
    assert not target.exists()


def test_blocks_and_classes_may_start_fresh(capsys, tmp_path):
    plain = create_model("i3d_r50_8x8", num_classes=6, width=WIDTH)
    path, target = tmp_path / "plain.pkl", tmp_path / "m.safetensors"
    files.write(path, export_foreign(plain), format="caffe2")
    new = ("--new", "blocks", "--new", "classifier")
    extra = ("--option", "blocks=5", "--option", "num_classes=4")
    code, out, _ = nlk(capsys, path, target, "--model", "i3d_r50_8x8", *new, *extra)
    assert code == 0
    assert "265 matched, 67 expected new, 0 unexpected, 0 missing" in out
    model = load_weights(target)
    assert torch.equal(model.conv1.weight, plain.conv1.weight)
    assert model.fc.out_features == 4


def test_images_inflate(capsys, tmp_path):
    """torchvision's names and two dimensions: each repeated over time, divided by its frames."""
    image = create_model("slowfast_c2d_r50_8x8", num_classes=6, width=WIDTH)
    path, target = tmp_path / "resnet50.pth", tmp_path / "m.safetensors"
    files.write(path, export_foreign(image, "torchvision"), format="torch")
    assert files.read(path).state["conv1.weight"].dim() == 4
    argv = ("--model", "i3d_r50_8x8", "--option", f"width={WIDTH}")
    code, out, _ = nlk(capsys, path, target, *argv)
    assert code == 0
    assert "inflated (10): conv1.weight" in out
    weight = load_weights(target).conv1.weight
    torch.testing.assert_close(weight.sum(2, keepdim=True), image.conv1.weight)
    assert torch.equal(weight[:, :, 0], weight[:, :, 4])


def test_averages_are_announced_and_chosen(tmp_path):
    state = export_foreign(network("tsm"))
    average = {key: torch.zeros_like(value) for key, value in state.items()}
    path, target = tmp_path / "both.pth", tmp_path / "m.safetensors"
    torch.save({"state_dict": state, "state_dict_ema": average}, path)
    options = {"width": WIDTH}
    assert "other weights in it: state_dict_ema (--entry)" in convert(path, target, options=options)
    convert(path, target, options=options, entry="state_dict_ema")
    assert not load_weights(target).fc.weight.any()


def test_blobs_are_folded_and_stripped_as_by_the_original_s_tools(capsys, tmp_path):
    path = checkpoint(tmp_path, "caffe2", conv1_w_momentum=torch.ones(1))
    for rewrite, count, lr in (("affine", 209, 0.00125), ("finetune", 209, 0.01)):
        target = tmp_path / f"{rewrite}.pkl"
        code, out, _ = nlk(capsys, path, target, "--rewrite", rewrite, "--to", "caffe2")
        assert code == 0
        assert f"rewritten ({rewrite}): {count} blobs" in out
        found = files.read(target)
        assert len(found.state) == count
        assert found.metadata["lr"] == lr
        assert (found.entry, found.extra) == ("", {})
    for name in ("i3d_r50_32x4", "i3d_r50_128x1"):  # a long clip's network starts from these
        target = tmp_path / "m.safetensors"
        argv = ("--model", name, "--new", "classifier")
        code, out, _ = nlk(capsys, tmp_path / "affine.pkl", target, *argv)
        assert code == 0
        assert "2 expected new" in out
    target = tmp_path / "long.pkl"  # a network in between leaves what the tool makes of it
    argv = ("--rewrite", "affine", "--model", "i3d_r50_32x4", "--new", "classifier")
    assert nlk(capsys, path, target, "--to", "caffe2", *argv)[0] == 0
    assert (files.read(target).metadata, files.read(target).extra) == ({"lr": 0.00125}, {})
    code, out, _ = nlk(
        capsys, tmp_path / "affine.pkl", tmp_path / "b.pkl", "--rewrite", "batch", "--to", "caffe2"
    )
    assert code == 0
    assert len(files.read(tmp_path / "b.pkl").state) == 209 + 116


def test_momenta_survive_the_way_back(tmp_path):
    path = checkpoint(tmp_path, "caffe2", conv1_w_momentum=torch.ones(1))
    options = {"width": WIDTH}
    convert(path, tmp_path / "b", to="caffe2", name="i3d_r50_8x8", options=options)
    source, back = files.read(path), files.read(tmp_path / "b")
    assert equal(back.state, source.state)
    assert equal(back.extra, source.extra)
    assert back.metadata == source.metadata


def test_networks_that_another_system_lacks(capsys, tmp_path):
    path, ours = checkpoint(tmp_path, "caffe2"), tmp_path / "m.safetensors"
    assert nlk(capsys, path, ours, "--model", "i3d_r50_8x8")[0] == 0
    with pytest.raises(ValueError, match="expected a network that slowfast has, got i3d_r50_8x8"):
        convert(ours, tmp_path / "x", to="slowfast")
    assert not (tmp_path / "x").exists()


MISTAKES = {
    "source": (["none.pkl", "x"], "expected a checkpoint, got 'none.pkl'"),
    "folder": (["caffe2.checkpoint", "no/such/x"], "got none at no/such; make it first"),
    "same": (["caffe2.checkpoint", "caffe2.checkpoint"], "expected another file to write to"),
    "to": (["caffe2.checkpoint", "x", "--to", "caffe3"], "did you mean 'caffe2'?"),
    "from": (
        ["caffe2.checkpoint", "x", "--from", "tms", "--model", "tsm_r50"],
        "did you mean 'tsm'",
    ),
    "option": (["caffe2.checkpoint", "x", "--option", "blocks"], "got 'blocks'; write for example"),
    "unknown": (["caffe2.checkpoint", "x", "--model", "tsm_r50", "--option", "blokcs=5"], "blocks"),
    "entry": (["caffe2.checkpoint", "x", "--entry", "ema"], "one set of weights, and not 'ema'"),
    "rewrite": (["tsm.checkpoint", "x", "--rewrite", "affine"], "expected a pickle of Caffe2"),
    "names": (["tsm.checkpoint", "x", "--classes", "names.txt", "names.txt"], "all 6 classes"),
    "no names": (["tsm.checkpoint", "x", "--classes", "blank.txt", "names.txt"], "got none; write"),
    "bad names": (["tsm.checkpoint", "x", "--classes", "bad.json", "names.txt"], "got JSONDecode"),
    "keys": (["other.safetensors", "x"], "got keys such as a, b that fit none; pass --model"),
}


@pytest.mark.parametrize(("argv", "part"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(capsys, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path, "caffe2")
    checkpoint(tmp_path, "tsm")
    files.write("other.safetensors", {"a": torch.ones(1), "b": torch.ones(1)})
    for name, text in (("names.txt", "a\nb\n"), ("blank.txt", "\n"), ("bad.json", "[")):
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.iterdir())
    code, out, err = nlk(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert part in err
    assert sorted(tmp_path.iterdir()) == before


def test_options_of_a_model():
    texts = ["blocks=5", "block.kind=concat", "block.scale=1.0", "norm=affine"]
    expected = {"blocks": 5, "block": {"kind": "concat", "scale": 1.0}, "norm": "affine"}
    assert parse_options(texts) == expected


def test_weights_that_do_not_fit_their_description(tmp_path):
    model = create_model("c2d_tiny", num_classes=3, width=WIDTH)
    with pytest.raises(ValueError, match=r"expected the weights of c2d_tiny with .*got fc.weight"):
        save_weights(tmp_path / "m", model, "c2d_tiny", {"num_classes": 4, "width": WIDTH})
    assert list(tmp_path.iterdir()) == []
    files.write(tmp_path / "other.safetensors", model.state_dict())
    with pytest.raises(ValueError, match=r"without the name of a model; convert it first"):
        load_weights(tmp_path / "other.safetensors")


@pytest.mark.parametrize("text", ["{num_classes", "[1]"])
def test_a_file_of_ours_with_broken_options_is_named(capsys, tmp_path, text):
    model, path = create_model("c2d_tiny", num_classes=3), tmp_path / "ours.safetensors"
    files.write(path, model.state_dict(), {"model": "c2d_tiny", "options": text})
    code = cli.main(["convert", str(path), str(tmp_path / "x"), "--to", "tsm"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert f"{path}: expected options of a model" in captured.err
    assert captured.err.count("\n") == 1


def test_weights_keep_their_dtype_and_draw_no_numbers(tmp_path):
    options = {"num_classes": 3, "width": WIDTH}
    model = create_model("c2d_tiny", **options).double()
    save_weights(tmp_path / "m.safetensors", model, "c2d_tiny", options)
    before = torch.get_rng_state()
    loaded = load_weights(tmp_path / "m.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    assert equal(loaded.state_dict(), model.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
