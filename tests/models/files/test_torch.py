"""Files of torch.save: nested, with objects of unknown classes, by old and new releases."""

import argparse
import collections
import sys
import types

import numpy as np
import pytest
import torch

from nlkernels.models import files
from tests.models.files.test_caffe2 import equal

WEIGHTS = {
    "conv1.weight": torch.rand(4, 3, 5, 7, 7),
    "bn1.num_batches_tracked": torch.tensor(7),
    "half": torch.rand(3).half(),
    "brain": torch.rand(3).bfloat16(),
    "mask": torch.rand(3) > 0.5,
    "byte": torch.arange(3, dtype=torch.uint8),
    "transposed": torch.rand(3, 4).t(),
    "part": torch.rand(10)[4:6],
    "expanded": torch.rand(1).expand(5),
    "empty": torch.empty(0, 3),
}
FORMATS = {"zip": True, "legacy": False}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def save(request, tmp_path):
    """Save as either format and read again."""

    def save_and_read(content, entry=None, **options):
        path = tmp_path / "model.pth"
        torch.save(content, path, _use_new_zipfile_serialization=request.param, **options)
        return files.read(path, entry=entry)

    return save_and_read


def test_all_dtypes_strides_and_views(save):
    found = save(WEIGHTS)
    assert equal(found.state, WEIGHTS)
    assert all(tensor.is_contiguous() for tensor in found.state.values())
    assert (found.format, found.entry, found.others) == ("torch", "", ())


def test_tensors_share_no_memory(save):
    shared = torch.zeros(4)
    state = save({"a": shared, "b": shared}).state
    state["a"] += 1
    assert not state["b"].any()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(save, protocol):
    found = save({"state_dict": WEIGHTS, "epoch": 3}, pickle_protocol=protocol)
    assert equal(found.state, WEIGHTS)
    assert found.metadata == {"epoch": 3}


@pytest.mark.parametrize(
    "entry", ["state_dict", "model_state", "model_state_dict", "model", "weights", "a.model"]
)
def test_nested_weights(save, entry):
    content = WEIGHTS
    for name in reversed(entry.split(".")):
        content = {name: content}
    found = save({"epoch": 3, "arch": "i3d", **content})
    assert equal(found.state, WEIGHTS)
    assert found.entry == entry
    assert found.metadata == {"epoch": 3, "arch": "i3d"}


def test_parameters_modules_and_ordered_dictionaries(save):
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.BatchNorm3d(3))
    assert equal(save(model.state_dict()).state, model.state_dict())
    parameters = collections.OrderedDict(model.named_parameters())
    assert equal(save(parameters).state, parameters)


def test_prefixes_of_parallel_training_are_dropped(save):
    once = {f"module.{key}": tensor for key, tensor in WEIGHTS.items()}
    twice = {f"module.{key}": tensor for key, tensor in once.items()}
    assert equal(save(once).state, WEIGHTS)
    assert equal(save({"state_dict": twice}).state, WEIGHTS)
    mixed = {**WEIGHTS, "module.x": torch.zeros(1)}
    assert equal(save(mixed).state, mixed)


def test_averages_are_reported_and_can_be_read(save):
    average = {key: torch.zeros_like(tensor) for key, tensor in WEIGHTS.items()}
    content = {"state_dict_ema": average, "state_dict": WEIGHTS}
    found = save(content)
    assert equal(found.state, WEIGHTS)
    assert found.others == ("state_dict_ema",)
    assert equal(save(content, entry="state_dict_ema").state, average)
    with pytest.raises(ValueError, match="'state_dict', none in 'ema'"):
        save(content, entry="ema")


def test_optimisers_and_random_states_are_left_out(save):
    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.rand(1, 3)).sum().backward()
    optimiser.step()
    content = {
        "optimizer": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
        "model_state": model.state_dict(),
    }
    found = save(content, entry="model_state")
    assert equal(found.state, model.state_dict())


class Config(dict):
    """As of mmcv or easydict: a dictionary with attributes."""

    __getattr__ = dict.__getitem__


class Settings:
    def __init__(self):
        self.lr = 0.1
        self.where = {"a": [1, 2]}

    def __setstate__(self, state):
        raise AssertionError("executed")


@pytest.fixture
def elsewhere(monkeypatch):
    """Classes of a package that is gone when the file is read."""
    module = types.ModuleType("mmcv_of_old")
    for kind in (Config, Settings):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


def test_objects_of_unknown_classes_do_not_stop_reading(save, elsewhere):
    meta = {
        "cfg": Config(a=1),
        "settings": Settings(),
        "args": argparse.Namespace(lr=0.1, steps=[1]),
        "classes": {"cat", "dog"},
        "counts": collections.defaultdict(list, a=[1]),
        "type": torch.float32,
        "device": torch.device("cpu"),
        "size": torch.Size((1, 2)),
        "best": np.float64(76.5),
        "history": np.zeros(3),
        "mmengine_version": "0.1",
        "shape": slice(1, 2),
    }
    found = save({"meta": meta, "state_dict": WEIGHTS})
    assert equal(found.state, WEIGHTS)
    assert found.metadata == {"meta.best": 76.5, "meta.mmengine_version": "0.1"}


def test_arrays_among_the_weights(save):
    found = save({"a": torch.ones(2), "b": np.ones(3)})
    assert equal(found.state, {"a": torch.ones(2), "b": torch.ones(3).double()})


def test_pickled_modules_name_the_remedy(save):
    with pytest.raises(ValueError, match=r"a pickled torch.nn.modules.linear.Linear; save its sta"):
        save(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("content", [[1, 2], "text", {"epoch": 3}, {"lr": {"a": 1}}], ids=str)
def test_files_without_weights(save, content):
    with pytest.raises(ValueError, match="expected the weights of a model"):
        save(content)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_programs_name_the_remedy(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="a TorchScript program; save the state_dict"):
        files.read(tmp_path / "model.pt")


@pytest.mark.parametrize("entry", ["", "state_dict"])
def test_torch_loads_what_is_written(tmp_path, entry):
    path = tmp_path / "model.pth"
    files.write(path, WEIGHTS, {"epoch": 3}, format="torch", entry=entry)
    content = torch.load(path, weights_only=True)
    assert equal(content[entry] if entry else content, WEIGHTS)
    found = files.read(path)
    assert equal(found.state, WEIGHTS)
    assert found.metadata == ({"epoch": 3} if entry else {})
