"""The committed evidence says what the documents say, and the margins hold."""

import copy
import json

import pytest

from benchmarks import evidence


@pytest.fixture
def report():
    return json.loads(evidence.REPORT.read_text())


def test_document_is_generated_from_the_report_and_margins_hold():
    assert evidence.main(["--check"]) == 0


def test_evidence_is_three_seeds_of_the_packaged_configuration(report):
    assert report["config"]["compare"]["seeds"] == [0, 1, 2]
    assert report["command"] == "nlk compare evidence"
    for variant in report["variants"]:
        assert [run["seed"] for run in variant["runs"]] == [0, 1, 2]
        mean = sum(run["accuracy"] for run in variant["runs"]) / 3
        assert variant["accuracy"] == pytest.approx(mean)


def test_missed_margin_is_an_error(report, monkeypatch, tmp_path, capsys):
    worse = copy.deepcopy(report)
    next(v for v in worse["variants"] if v["name"] == "frame")["accuracy"] = 0.9
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(worse))
    monkeypatch.setattr(evidence, "REPORT", path)
    assert evidence.main(["--check"]) == 1
    assert "margin over frame" in capsys.readouterr().err
