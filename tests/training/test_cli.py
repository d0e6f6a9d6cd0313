"""Command line: exit codes, one-line errors, lazy imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nlkernels import cli

ROOT = Path(__file__).parents[2]


def run(capsys, *argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


ERRORS = {
    "unknown-config": (["demoo"], "did you mean 'demo'?"),
    "missing-file": (["no/such.yaml"], "got 'no/such.yaml'; check the path"),
    "unknown-key": (["demo", "optim.stepz=3"], "did you mean 'optim.steps'?"),
    "wrong-type": (["demo", "optim.steps=many"], "expected optim.steps to be an integer"),
    "no-root": (["demo_videos"], "add data.root=DIR"),
    "missing-folder": (["demo_videos", "data.root=no/such/folder"], "no/such/folder"),
    "unknown-device": (["smoke", "run.device=gpu"], "expected run.device to be auto, cpu or"),
    "absent-device": (["smoke", "run.device=cuda:99"], "got 'cuda:99'; use auto"),
    "unknown-model": (["smoke", "model.name=c2d_tinny"], "c2d_tiny"),
    "unknown-block-option": (["smoke", "model.block.knd=softmax"], "kind"),
    "wrong-classes": (["smoke", "model.num_classes=7"], "leave model.num_classes unset"),
    "missing-checkpoint": (["smoke", "run.resume=no.pt"], "checkpoint: expected a file"),
}


@pytest.mark.parametrize(("argv", "part"), ERRORS.values(), ids=ERRORS)
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", *argv)
    assert code == 2
    assert err.startswith("nlk train: ")
    assert err.count("\n") == 1
    assert part in err


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["compare"]], ids=" ".join)
def test_a_run_folder_that_cannot_be(capsys, tmp_path, monkeypatch, command):
    def run_in(out):
        return run(capsys, *command, "smoke", f"run.out={out}")

    (tmp_path / "file").write_text("")
    for out in ("file", "file/below", "file/a/b"):
        code, _, err = run_in(tmp_path / out)
        assert code == 2 and err.count("\n") == 1
        assert f"expected run.out to name a folder, got the file {tmp_path / 'file'}" in err
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "got the file" in run_in(tmp_path / "link")[2]
    # Those who run tests may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    code, _, err = run_in(tmp_path / "new" / "run")
    assert code == 2 and f"no permission to write into {tmp_path}; choose another folder" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_no_videos_in_the_folder(capsys, tmp_path):
    out = f"run.out={tmp_path / 'out'}"
    code, _, err = run(capsys, "train", "demo_videos", f"data.root={tmp_path}", out)
    assert code == 2
    assert err.count("\n") == 1
    assert str(tmp_path) in err


def test_compare_without_blocks(capsys, tmp_path):
    out = f"run.out={tmp_path / 'out'}"
    code, _, err = run(capsys, "compare", "smoke", "model.blocks=0", out)
    assert code == 2
    assert "expected model.blocks >= 1, got 0" in err


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, "train", "demoo", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("nlk train: config: expected")


def test_other_errors_are_one_line_with_their_class_and_exit_code_1(capsys, monkeypatch):
    def fail(arguments, command):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setitem(cli._COMMANDS, "info", fail)
    code, _, err = run(capsys, "info")
    assert code == 1
    assert err == (
        "nlk info: RuntimeError: out of memory; run again with --debug for the traceback\n"
    )


def test_missing_extra_names_the_remedy(capsys, monkeypatch):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name == "decord" else find_spec(name)
    )
    code, _, err = run(capsys, "train", "demo")
    assert code == 2
    assert err == (
        "nlk train: expected the packages of the video extra, got no decord; "
        "pip install 'nlkernels[video]'\n"
    )


def test_warnings_are_one_line(capsys, tmp_path):
    argv = ["smoke", "data.timeout_s=3", "optim.lrr=3", f"run.out={tmp_path}"]
    run(capsys, "train", *argv)
    code, _, err = run(
        capsys, "train", "smoke", "data.stride=3", "model.name=x", f"run.out={tmp_path}"
    )
    assert code == 2
    assert "nlk: warning: config: data.stride has no effect while data.kind is synthetic\n" in err


@pytest.mark.parametrize("argv", [[], ["train"], ["bogus"], ["train", "--bogus"]], ids=str)
def test_usage_errors(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: nlk" in capsys.readouterr().err


def test_overrides_may_stand_behind_options(capsys):
    code, _, err = run(capsys, "train", "smoke", "--debug", "optim.stepz=3")
    assert code == 2
    assert err.splitlines()[-1].endswith("did you mean 'optim.steps'?")
    with pytest.raises(SystemExit):
        cli.main(["info", "optim.steps=3"])
    assert "unrecognized arguments: optim.steps=3" in capsys.readouterr().err


def test_help_lists_the_packaged_configurations(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    assert "demo, demo_videos, evidence" in " ".join(capsys.readouterr().out.split())


def test_module_form_works_uninstalled_and_imports_lazily():
    code = "import sys; from nlkernels import cli; print([m for m in sys.modules if m == 'torch'])"
    environment = os.environ | {"PYTHONPATH": ""}
    for argv, expected in ((["-c", code], "[]"), (["-m", "nlkernels.cli", "-h"], "usage: nlk")):
        result = subprocess.run(
            [sys.executable, *argv],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert result.stdout.startswith(expected)


def test_info(capsys):
    code, out, err = run(capsys, "info")
    assert code == 0
    assert "torch" in out
    assert err == ""


@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [("models", ""), ("models", "1"), ("--help", "")],
    ids=["flushed", "unbuffered", "at the end"],
)
def test_a_reader_that_goes_away_ends_a_command_quietly(argv, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "nlkernels.cli", argv],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys, monkeypatch):
    def breaks(arguments, command):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli._COMMANDS, "info", breaks)
    code, _, err = run(capsys, "info")
    assert code == 2 and "Broken pipe" in err
