"""Configuration: resolved values, errors (snapshots of the messages), values without effect."""

import ast
import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from nlkernels.training import config as config_module
from nlkernels.training.config import Config, known_keys, to_dict, value_of
from nlkernels.training.config_file import (
    ConfigWarning,
    find_config,
    from_dict,
    load_config,
    packaged_configs,
)

FILE = "optim: {steps: 5}\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FILE)
    return path


def test_file_lists_only_what_differs(file):
    config = load_config(file)
    assert config.optim.steps == 5
    assert dataclasses.replace(config.optim, steps=None) == Config().optim
    assert config.data == Config().data
    assert config.run.out == str(Path("runs", "mine"))


def test_overrides_win_and_are_read_as_yaml(file):
    config = load_config(
        file,
        [
            "optim.steps=7",
            "optim.lr=1e-3",
            "compare.variants=[none, local]",
            "compare.profile.rounds=3",
            "model.block.kind=dot_product",
            "run.out=a folder",
            "data.preload=true",
        ],
    )
    assert config.optim.steps == 7
    assert config.optim.lr == 1e-3
    assert config.compare.variants == ("none", "local")
    assert config.compare.profile.rounds == 3
    assert config.model.block == {"kind": "dot_product"}
    assert config.run.out == "a folder"
    assert config.data.preload is True


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_load_without_ignored_values(name):
    overrides = ["data.root=videos"] if name == "demo_videos" else []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigWarning)
        load_config(name, overrides)


def test_packaged_names():
    assert {"demo", "demo_videos", "evidence"} <= set(packaged_configs())
    assert find_config("demo").name == "demo.yaml"


def test_round_trip_through_json(file):
    config = load_config(file, ["model.block={kind: gaussian}", "compare.seeds=[3, 4]"])
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


ERRORS = {
    "unknown-key": (
        ["optim.step=3"],
        ValueError,
        "config: expected a known key, got 'optim.step' in the command line; "
        "did you mean 'optim.steps'?",
    ),
    "unknown-section": (
        ["optmi.lr=3"],
        ValueError,
        "config: expected a known key, got 'optmi' in the command line; did you mean 'optim'?",
    ),
    "key-without-section": (
        ["nesterov=true"],
        ValueError,
        "config: expected a known key, got 'nesterov' in the command line; "
        "did you mean 'optim.nesterov'?",
    ),
    "key-in-wrong-section": (
        ["model.batch=3"],
        ValueError,
        "config: expected a known key, got 'model.batch' in the command line; "
        "did you mean 'optim.batch'?",
    ),
    "nothing-near": (
        ["optim.zzz=3"],
        ValueError,
        "config: expected a known key, got 'optim.zzz' in the command line; known here: name, lr, "
        "lr_batch, momentum, dampening, nesterov, weight_decay, decay, fc_lr5, schedule, unit, "
        "milestones, gamma, lengths, rates, patience, cosine_from, cosine_every, cosine_period, "
        "warmup, warmup_start, warmup_form, warmup_every, warmup_to, steps, epochs, batch, "
        "accumulate, clip_norm, precision, max_skips, ema, norms, sync_norms, precise_norms, "
        "freeze, only_nonlocal, ft_begin_index",
    ),
    "float-for-int": (
        ["optim.steps=1.5"],
        TypeError,
        "config: expected optim.steps to be an integer, got 1.5 (a number) in the command line; "
        "write for example optim.steps=10",
    ),
    "bool-for-int": (
        ["optim.batch=true"],
        TypeError,
        "config: expected optim.batch to be an integer, got True (bool) in the command line; "
        "write for example optim.batch=10",
    ),
    "text-for-float": (
        ["optim.lr=fast"],
        TypeError,
        "config: expected optim.lr to be a number, got 'fast' (a text) in the command line; "
        "write for example optim.lr=0.1",
    ),
    "int-for-bool": (
        ["data.preload=1"],
        TypeError,
        "config: expected data.preload to be true or false, got 1 (an integer) in the command "
        "line; write for example data.preload=true",
    ),
    "null-for-int": (
        ["optim.batch=null"],
        TypeError,
        "config: expected optim.batch to be an integer, got None (nothing) in the command line; "
        "write for example optim.batch=10",
    ),
    "text-for-list": (
        ["compare.variants=none"],
        TypeError,
        "config: expected compare.variants to be a list, got 'none' (a text) in the command line; "
        "write for example compare.variants='[name]'",
    ),
    "wrong-item": (
        ["compare.seeds=[1, x]"],
        TypeError,
        "config: expected compare.seeds to be an integer, got 'x' (a text) in the command line; "
        "write for example compare.seeds=10",
    ),
    "wrong-length": (
        ["data.short_side=[1, 2, 3]"],
        TypeError,
        "config: expected data.short_side to be a list of 2, got [1, 2, 3] (a list) in the command "
        "line; write for example data.short_side='[1, 1]'",
    ),
    "value-for-section": (
        ["optim=3"],
        TypeError,
        "config: expected optim to be a section with keys, got 3 in the command line; "
        "write its keys one level below it",
    ),
    "section-for-value": (
        ["optim.steps.x=3"],
        ValueError,
        "config: expected 'steps' to be a section, as 'optim.steps.x' says, got 5; "
        "override 'steps' itself",
    ),
    "unknown-choice": (
        ["optim.schedule=cosin"],
        ValueError,
        "config: expected optim.schedule to be one of cosine, step, multistep, plateau, constant, "
        "got 'cosin' in the command line; did you mean 'cosine'?",
    ),
    "unknown-variant": (
        ["compare.variants=[none, fsat]"],
        ValueError,
        "config: expected compare.variants from none, naive, fast, local, frame, got 'fsat'; "
        "did you mean 'fast'?",
    ),
    "repeated-seed": (
        ["compare.seeds=[1, 1]"],
        ValueError,
        "config: expected compare.seeds without repetition and not empty, got [1, 1]; "
        "list each once",
    ),
    "too-small": (
        ["optim.batch=0"],
        ValueError,
        "config: expected optim.batch >= 1, got 0; write for example optim.batch=1",
    ),
    "not-positive": (
        ["model.width=0"],
        ValueError,
        "config: expected model.width > 0, got 0.0; give a positive number",
    ),
    "nan": (
        ["optim.lr=.nan"],
        ValueError,
        "config: expected optim.lr >= 0, got nan; give zero or more",
    ),
    "steps-and-epochs": (
        ["optim.epochs=2"],
        ValueError,
        "config: expected one of optim.steps and optim.epochs, got both; "
        "set one and give the other as null",
    ),
    "neither-steps-nor-epochs": (
        ["optim.steps=null"],
        ValueError,
        "config: expected one of optim.steps and optim.epochs, got neither; "
        "set one and give the other as null",
    ),
    "folder-without-root": (
        ["data.kind=folder"],
        ValueError,
        "config: expected data.root to name the folder of the videos, got nothing; "
        "add data.root=DIR",
    ),
    "crop-larger-than-frame": (
        ["data.size=60"],
        ValueError,
        "config: expected data.size <= data.short_side[0] <= data.short_side[1], "
        "got 60, 56, 64; enlarge data.short_side",
    ),
    "no-equals-sign": (
        ["optim.steps"],
        ValueError,
        "config: expected overrides of the form section.key=value, got 'optim.steps'; "
        "write for example optim.steps=10",
    ),
    "no-yaml": (
        ["optim.steps=[1"],
        ValueError,
        "config: expected a YAML value after '=', got 'optim.steps=[1'; put texts in quotes",
    ),
}


@pytest.mark.parametrize(("overrides", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_error_messages(file, overrides, error, message):
    with pytest.raises(error) as caught:
        load_config(file, overrides)
    assert str(caught.value) == message


FILE_ERRORS = {
    "unknown-key": (
        "optim: {steps: 5, lrr: 1}",
        "config: expected a known key, got 'optim.lrr' in bad.yaml; did you mean 'optim.lr'?",
    ),
    "list": (
        "[1, 2]",
        "config: expected sections (model, data, ...) in {path}, got a list; "
        "write for example 'optim: {{steps: 10}}'",
    ),
    "broken": (
        "optim: {steps: 5",
        "config: expected valid YAML in {path}, got: while parsing a flow mapping in "
        "\"<unicode string>\", line 1, column 8: optim: {{steps: 5 ^ expected ',' or '}}', but got "
        "'<stream end>' in \"<unicode string>\", line 1, column 17: optim: {{steps: 5 ^; "
        "correct the file",
    ),
}


@pytest.mark.parametrize(("text", "message"), FILE_ERRORS.values(), ids=FILE_ERRORS)
def test_error_messages_of_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="config: expected") as caught:
        load_config(path)
    assert str(caught.value) == message.format(path=path)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest_packaged_one():
    with pytest.raises(FileNotFoundError) as caught:
        load_config("dmo")
    assert str(caught.value) == (
        f"config: expected a YAML file or one of {', '.join(packaged_configs())}, got 'dmo'; "
        "did you mean 'demo'?"
    )


IGNORED = {
    "momentum-of-adamw": ["optim.name=adamw", "optim.momentum=0.5"],
    "gamma-of-cosine": ["optim.gamma=0.5"],
    "files-of-a-folder": ["data.kind=folder", "data.root=x", "data.train_files=9"],
    "stride-of-generated": ["data.stride=2"],
    "options-of-no-blocks": ["model.blocks=0", "model.block.kind=gaussian"],
    "timeout-without-workers": ["data.timeout_s=5"],
}


@pytest.mark.parametrize("overrides", IGNORED.values(), ids=IGNORED)
def test_a_value_without_effect_warns(file, overrides):
    key = overrides[-1].partition("=")[0].removesuffix(".kind")
    with pytest.warns(ConfigWarning, match=f"{key} has no effect while"):
        load_config(file, overrides)


@pytest.mark.parametrize(
    ("command", "override"),
    [
        ("train", "compare.seeds=[1]"),
        ("compare", "run.seed=3"),
        ("compare", "run.colour_check=true"),
    ],
)
def test_an_override_that_the_command_does_not_look_at_warns(file, command, override):
    key = override.partition("=")[0]
    with pytest.warns(ConfigWarning, match=f"{key} has no effect in nlk {command}"):
        load_config(file, [override], command=command)
    other = "compare" if command == "train" else "train"
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigWarning)
        load_config(file, [override], command=other)


def test_every_key_has_a_docstring_and_a_default_of_its_type():
    tree = ast.parse(Path(config_module.__file__).read_text())
    for node in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{field.target.id} has no docstring"
    assert from_dict(to_dict(Config()) | {"optim": {"steps": 1}}).data == Config().data


def test_known_keys_reach_values():
    config = Config()
    for key in known_keys():
        value_of(config, key)
