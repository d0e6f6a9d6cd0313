"""nlk models: what is known of every network, as text."""

import pytest

from nlkernels import cli
from nlkernels.models import list_models
from nlkernels.models.listing import listing
from nlkernels.models.zoo import describe


def nlk(capsys, *argv):
    code = cli.main(["models", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_network(capsys):
    code, out, err = nlk(capsys, "i3d_r50_32x2")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "i3d_r50_32x2  i3d of caffe2; 32 frames, every 2nd; 224 px, tested at 256",
        "  github.com/facebookresearch/video-nonlocal-net; "
        "repository: CC-BY-NC-4.0; weights: CC-BY-NC-4.0",
        "  blocks                   parameters   published    executed   top-1   top-5",
        "  0                            28.04M      32.83G      32.83G    73.6    90.8",
        "  5 softmax                    35.40M      40.96G      40.96G    74.9    91.6",
        "  Kinetics-400: 10 clips x 3 crops of 256, softmax at 2 x 2 locations, "
        "probabilities averaged",
        "",
    ]


def test_dot_products_cost_less_than_the_published_count(capsys):
    _, out, _ = nlk(capsys, "mmaction_i3d_r50_32x2")
    row = next(line.split() for line in out.splitlines() if "dot_product" in line)
    published, executed = (float(number.rstrip("G")) for number in row[3:5])
    assert executed < published - 1
    assert row[5:] == ["74.8", "92.07"]


@pytest.mark.parametrize("name", list_models("*_r50*_8x8") + list_models("c2d_tiny"))
def test_every_published_result_is_in_a_row(name):
    lines = "\n".join(listing(name))
    for result in describe(name).results:
        label = " ".join(filter(None, (str(result.blocks), result.kind, result.recipe)))
        rows = [line for line in lines.splitlines() if line.startswith(f"  {label:<22}")]
        assert len(rows) == 1
        assert f" {result.top1:g}" in rows[0]
        assert result.protocol in lines


def test_a_pattern_that_no_name_has(capsys):
    code, out, err = nlk(capsys, "i3d_r50_8x9")
    assert (code, out) == (2, "")
    assert err == (
        "nlk models: expected a pattern of names of models, got 'i3d_r50_8x9', which none has; "
        "did you mean 'i3d_r50_8x8'?\n"
    )
    code, _, err = nlk(capsys, "zzz*")
    assert code == 2 and err.endswith("which none has; nlk models without a pattern lists all\n")
