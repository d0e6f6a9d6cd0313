"""`nlk info` names everything a bug report needs and never fails itself."""

import json
import runpy
import sys

import pytest
import torch

import nlkernels
from nlkernels import _build, _cache, _env, _ext, _launch, _paths, info
from nlkernels._spec import KINDS
from nlkernels.functional import _EXPLAINERS


def _section(text: str, title: str) -> str:
    """The lines below a title, up to the next empty line."""
    return text.split(f"{title}\n", 1)[1].split("\n\n", 1)[0]


def test_versions():
    text = _section(info.report(), "versions")
    assert nlkernels.__version__ in text
    assert torch.__version__ in text
    assert sys.version.split()[0] in text


def test_missing_package_names_its_extra(monkeypatch):
    def nothing_installed(name: str) -> str:
        raise info.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", nothing_installed)
    text = _section(info.report(), "versions")
    assert "not installed (pip install nlkernels[video])" in text


def test_devices():
    text = _section(info.report(), "devices")
    assert torch.backends.cpu.get_cpu_capability() in text
    assert ("cuda:0" in text) == torch.cuda.is_available()


@pytest.fixture(scope="module")
def backends():
    return _section(info.report(), "backends")


def _row(text: str, label: str) -> str:
    """The lines of one label: those below it have none."""
    lines = text.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith(f"  {label} "))
    end = first + 1
    while end < len(lines) and lines[end].startswith("   "):
        end += 1
    return "\n".join(lines[first:end])


def _operands(name: str) -> list[torch.Tensor]:
    features = torch.empty(1, 256, 8, 28, 28)
    rows, keys = torch.empty(1, 6272, 256), torch.empty(1, 1568, 256)
    return {
        "nonlocal_concat": [rows[..., 0], keys[..., 0], keys],
        "region_aggregate": [features, torch.empty(256, 3, 7, 7)],
        "channel_gate": [features, torch.empty(256)],
    }.get(name, [rows, keys, keys])


@pytest.mark.parametrize("name", [*KINDS, "nonlocal_concat", "region_aggregate", "channel_gate"])
def test_backends_with_reasons(name, backends):
    op, options = ("nonlocal_attention", {"kind": name}) if name in KINDS else (name, {})
    explanation = nlkernels.explain(op, *_operands(name), **options)
    row = _row(backends, f"cpu float32 {name}")
    assert row.split()[3] == explanation.backend
    for backend, reason in explanation.reasons.items():
        assert backend == explanation.backend or f"not {backend}: {reason}" in row


def test_every_public_operation_is_listed(backends):
    for name in set(_EXPLAINERS) - {"nonlocal_attention"}:
        assert f"cpu bfloat16 {name}" in backends


def test_kernels_and_what_is_known_of_them(monkeypatch, tmp_path):
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_launch, "interpreting", lambda: True)
    cpu = torch.device("cpu")
    _cache.forget()
    try:
        text = _section(info.report(), "kernels")
        assert "sm_80" in text and "interpreter" in text and "nothing verified yet" in text
        row = {"op": "softmax", "backend": "triton", "pass": "forward", "dtype": "float16"}
        for name, reason in (("a forward", ""), ("a backward", "failed verification: d_key")):
            _cache.update(cpu, "verdicts", {name: {**row, "head": [16, 16], "reason": reason}})
        text = _section(info.report(), "kernels")
        assert "a forward: verified" in text and "a backward: failed verification: d_key" in text
        assert str(tmp_path / "cache") in _section(info.report(), "paths")
    finally:
        _cache.forget()


def test_native_code(monkeypatch, tmp_path):
    """Nothing of it is compiled by asking."""
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_ext, "CPU", _ext.Extension("_C", _paths.csrc_dir))
    with monkeypatch.context() as context:
        context.setenv("NLKERNELS_JIT", "0")
        text = _section(info.report(), "native code")
        assert "missing: nlkernels: expected native code" in text or "installed: " in text
        context.setenv("CXX", "/no/such/compiler")
        text = _section(info.report(), "native code")
        assert "compiler         missing: expected a C++ compiler, got CXX=" in text
    text = _section(info.report(), "native code")
    assert str(tmp_path / "cache") in text
    assert not (tmp_path / "cache").exists()
    assert _build.host_isa(_build.Sources.read(_paths.csrc_dir()).isas()) in text


def test_impossible_setting_is_reported_and_nothing_else_is_lost(monkeypatch):
    monkeypatch.setenv("NLKERNELS_BACKEND", "no_such_backend")
    text = info.report()
    assert "error: NLKERNELS_BACKEND" in _section(text, "backends")
    assert "no_such_backend (set)" in _section(text, "environment variables")
    assert str(_paths.csrc_dir()) in _section(text, "paths")


@pytest.mark.parametrize("name", sorted(_env.VARIABLES))
def test_every_variable_is_documented(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    variable = _env.VARIABLES[name]
    assert name.startswith("NLKERNELS_")
    assert f"{variable.default} (default): {variable.doc}" in info.report()


def test_empty_variable_means_default(monkeypatch):
    monkeypatch.setenv("NLKERNELS_BACKEND", "")
    assert _env.read("NLKERNELS_BACKEND") == "auto"


def test_undeclared_variable_is_an_error():
    with pytest.raises(KeyError):
        _env.read("NLKERNELS_NO_SUCH_VARIABLE")


def test_variables_of_others_are_listed_with_their_values(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    text = _section(info.report(), "environment variables")
    assert f"3 (set): {_env.OTHERS['OMP_NUM_THREADS']}" in text
    assert f"empty (not set): {_env.OTHERS['CUDA_HOME']}" in text


def test_caches_have_paths_and_sizes(monkeypatch, tmp_path):
    monkeypatch.setenv("NLKERNELS_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    module = tmp_path / "ours" / "ext" / "0.1.0" / "key" / "_C.so"
    module.parent.mkdir(parents=True)
    module.write_bytes(bytes(3 * 2**20))
    text = _section(info.report(), "caches")
    assert f"{tmp_path / 'ours' / 'ext'}: 1 files, 3.0 MiB" in text
    assert f"{tmp_path / 'triton'}: nothing yet" in text
    found = info.as_json()["caches"]["compiled modules"]
    assert found == {"path": str(tmp_path / "ours" / "ext"), "files": 1, "size_bytes": 3 * 2**20}


def test_json_holds_what_the_text_says(capsys):
    info.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    text = info.report()
    assert list(found) == [line for line in text.splitlines() if line and line[0] != " "]
    chosen = found["backends"]["cpu float32 softmax"]
    assert _row(_section(text, "backends"), "cpu float32 softmax").split()[3] == chosen["backend"]
    assert chosen["others"] and all(chosen["others"].values())
    for name, variable in _env.VARIABLES.items():
        setting = found["environment variables"][name]
        assert setting["meaning"] == variable.doc
        assert setting["value"] == _env.read(name)
    assert found["native code"].keys() >= {"compiler", "cuda compiler", "cuda module"}


def test_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "nlkernels.info")
    monkeypatch.setattr(sys, "argv", ["info"])
    runpy.run_module("nlkernels.info", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("versions\n")
    assert printed.endswith(f"python        {sys.executable}\n")
