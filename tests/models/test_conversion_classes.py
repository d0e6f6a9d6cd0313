"""nlk convert: orders of classes, and what trainings keep beside the weights."""

import json

import pytest
import torch

from nlkernels.models import files
from nlkernels.models.weights import load_weights
from tests.models.files.test_caffe2 import equal
from tests.models.test_conversion import checkpoint, network, nlk


@pytest.mark.parametrize("kept", [6, 4])
def test_classes_of_another_order(capsys, tmp_path, kept):
    """MindSpore numbers classes as they appear in its training list, others by the alphabet."""
    names = ["zumba", "abseiling", "eating ice cream", "yoga", "archery", "bowling"]
    rows = "".join(f"{name},id{number},0,10\n" for number, name in enumerate([*names, *names]))
    (tmp_path / "train.csv").write_text(f"label,youtube_id,time_start,time_end\n{rows}")
    ours = sorted(names)[:kept]
    quoted = {f'"{name}"' if " " in name else name: row for row, name in enumerate(ours)}
    (tmp_path / "classids.json").write_text(json.dumps(quoted))
    path, target = checkpoint(tmp_path, "mindspore"), tmp_path / "ours.safetensors"
    order = tmp_path / "train.csv", tmp_path / "classids.json"
    code, out, err = nlk(capsys, path, target, "--classes", *order)
    assert (code, err) == (0, ""), err
    assert "class_order" not in files.read(target).metadata
    assert f"classes: {kept} of 6, in the order of {order[1]}" in out
    theirs = network("mindspore").fc
    got = load_weights(target).fc
    places = [names.index(name) for name in ours]
    assert torch.equal(got.weight, theirs.weight[places])
    assert torch.equal(got.bias, theirs.bias[places])
    assert json.loads(files.read(target).metadata["classes"]) == ours
    back = tmp_path / "back.ckpt"
    code, *_ = nlk(capsys, path, back, "--classes", *order, "--to", "mindspore")
    assert code == 0
    reread = files.read(back).state
    heads = [value for value in reread.values() if value.shape in {(kept,), got.weight.shape}]
    assert any(torch.equal(value.reshape(-1), got.bias) for value in heads)


def test_classes_that_are_not_in_the_order_of_the_alphabet_are_announced(capsys, tmp_path):
    path, target = checkpoint(tmp_path, "mindspore"), tmp_path / "m.safetensors"
    order = "as they first appear in the training list, not by the alphabet"
    code, out, _ = nlk(capsys, path, target)
    assert code == 0
    assert f"note: classes are numbered {order}" in out
    assert files.read(target).metadata["class_order"] == order
    new = ("--new", "classifier", "--option", "num_classes=4")
    code, out, _ = nlk(capsys, path, target, "--model", "mindspore_i3d_r50_32", *new)
    assert code == 0
    assert "classes are numbered" not in out
    assert "class_order" not in files.read(target).metadata


# What MindSpore's training keeps beside the weights.
MINDSPORE = {
    "moments.backbone.conv1.features.0.weight": torch.ones(8, 3, 5, 7, 7),
    "moments.head.dense.weight": torch.ones(6, 256),
    "accum.head.dense.bias": torch.ones(6),
    "stat.head.dense.bias": torch.ones(6),
    "learning_rate": torch.tensor(0.1),
    "momentum": torch.tensor(0.9),
    "global_step": torch.tensor([7], dtype=torch.int32),
    "epoch_num": torch.tensor(3, dtype=torch.int32),
    "step_num": torch.tensor(4975, dtype=torch.int32),
}


def test_checkpoints_of_a_mindspore_training(capsys, tmp_path):
    """The optimiser's entries are no weights; they go back into a file of the same system."""
    path, target = checkpoint(tmp_path, "mindspore", **MINDSPORE), tmp_path / "m.safetensors"
    code, out, _ = nlk(capsys, path, target)
    assert code == 0
    assert "0 unexpected, 0 missing" in out
    assert f"ignored ({len(MINDSPORE)})" in out
    assert equal(load_weights(target).state_dict(), network("mindspore").state_dict())
    assert nlk(capsys, path, tmp_path / "back.ckpt", "--to", "mindspore")[0] == 0
    assert equal(files.read(tmp_path / "back.ckpt").state, files.read(path).state)


REORDERED = {
    "caffe2": ("i3d_r50_8x8", {"conv1_w_momentum": 8, "pred_w_momentum": 6, "pred_b_momentum": 6}),
    "mindspore": ("mindspore_i3d_r50_32", dict.fromkeys(MINDSPORE, 6)),
}


@pytest.mark.parametrize("system", REORDERED)
def test_momenta_of_classes_do_not_survive_another_order(capsys, tmp_path, system):
    """Their rows would be those of other classes."""
    name, entries = REORDERED[system]
    path = checkpoint(tmp_path, system, **{key: torch.ones(n) for key, n in entries.items()})
    for file, names in (("theirs.txt", "abcdef"), ("ours.txt", "bacdef")):
        (tmp_path / file).write_text("\n".join(names))
    back, order = tmp_path / "back", (tmp_path / "theirs.txt", tmp_path / "ours.txt")
    code, _, err = nlk(capsys, path, back, "--model", name, "--to", system, "--classes", *order)
    assert (code, err) == (0, "")
    found = files.read(back)
    kept = {key for key in entries if key in {**found.state, **found.extra}}
    assert kept == {key for key in entries if "pred" not in key and "head.dense" not in key}
