"""The section data: impossible combinations in one line each, values without effect, docstrings."""

import ast
import dataclasses
import warnings
from pathlib import Path

import pytest

from nlkernels.training import config_data
from nlkernels.training.config_data import IGNORED_WHEN, DataConfig, check_data
from nlkernels.training.config_file import ConfigWarning, load_config

LISTS = ("data.kind=list", "data.train_list=a.txt", "data.test_list=b.txt")


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {steps: 5}\n")
    return lambda *overrides: load_config(path, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.kind=list", "data.test_list=b.txt"],
            "data.train_list to name the list of the training videos, got nothing",
        ),
        (LISTS[:2], "data.test_list to name the list of the test videos, got nothing"),
        (["data.reader=frames"], "data.kind=list with folders of images, got synthetic with"),
        (
            [*LISTS, "data.reader=frames", "data.list_format=lmdb"],
            "video files in an lmdb, got data.reader=frames",
        ),
        ([*LISTS, "data.reader=flow"], "data.colours of a flow .* got data.colours=grey"),
        (["data.colours=flow_tsm"], "data.colours of a flow with data.reader=flow, and only there"),
        (
            [*LISTS, "data.reader=flow", "data.colours=unit", "data.channels=bgr"],
            "no order or jitter of colours for flow",
        ),
        (["data.colour_jitter=[0.4, 1, 0]"], "0 <= data.colour_jitter < 1, got"),
        (["data.max_failed=2"], "0 <= data.max_failed <= 1, got 2"),
        (
            ["data.test_crops=six_flip", "data.crop_rule=tsm"],
            "data.crop_rule=caffe2 with data.test_crops=six_flip",
        ),
        (["data.test_crops=ten"], "data.crop_rule=mmaction or tsm with data.test_crops=ten"),
        (
            ["data.test_crops=three", "data.crop_rule=mmaction"],
            "test windows as large as the short side .* got 48 and 56",
        ),
        (["data.test_size=60"], "a test window .* of at most the test's short side, got 60 and 56"),
        (
            [*LISTS, "data.reader=frames", "data.decode=child"],
            "video files with data.decode=child, got data.reader=frames",
        ),
        (["data.test_short_side=0"], "expected data.test_short_side >= 1, got 0"),
        (["data.decode_timeout_s=0"], "expected data.decode_timeout_s > 0, got 0"),
        (["data.sampler=tsn"], "data.sampler to be one of caffe2, .* did you mean 'tsm'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list | tuple) else None,
)
def test_impossible_values_are_one_line(load, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(*overrides)
    text = str(caught.value)
    assert text.startswith("config: expected ")
    assert ", got " in text
    assert "; " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("overrides", "ignored"),
    [
        (["data.train_list=a"], "data.train_list has no effect while data.kind is synthetic"),
        (["data.template=x_{}.jpg"], "data.template has no effect while data.reader is auto"),
        (
            [*LISTS, "data.sampler=tsm", "data.stride=2"],
            "data.stride has no effect while data.sampler is tsm",
        ),
        (
            [*LISTS, "data.sampler=inception", "data.test_clips=3"],
            "data.test_clips has no effect while data.sampler is inception",
        ),
        (
            [*LISTS, "data.preload=true", "data.check=none"],
            "data.check has no effect while data.preload is True",
        ),
        (
            [*LISTS, "data.class_order=first_appearance"],
            "data.class_order has no effect while data.list_format is mmaction",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_values_without_effect_are_warned_about(load, overrides, ignored):
    with pytest.warns(ConfigWarning, match=ignored):
        load(*overrides)


def test_lists_that_fit_warn_about_nothing(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(
            *LISTS,
            "data.list_format=tsm",
            "data.reader=frames",
            "data.template='{:05d}.jpg'",
            "data.sampler=tsm_twice",
            "data.augment=tsm",
            "data.crop_rule=tsm",
            "data.colours=imagenet",
            "data.short_side=[256, 256]",
            "data.size=224",
            "data.test_size=256",
            "data.test_crops=three",
        )


def test_ignored_keys_are_keys():
    names = {field.name for field in dataclasses.fields(DataConfig)}
    for key, because, _ in IGNORED_WHEN:
        assert key.removeprefix("data.") in names
        assert because.removeprefix("data.") in names


def test_every_key_has_a_docstring():
    tree = ast.parse(Path(config_data.__file__).read_text())
    (node,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), f"{field.target.id} has no docstring"


def test_defaults_are_possible():
    check_data(DataConfig())
