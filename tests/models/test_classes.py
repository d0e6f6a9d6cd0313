"""Classifiers of other classes, and class numbers of other orders."""

import pytest
import torch

from nlkernels.models import create_model
from nlkernels.models.classes import (
    alphabetical,
    by_number,
    class_rows,
    first_appearance,
    take_classes,
)

LIST = ["zumba", "", "making tea", "abseiling", "zumba", "celebrating (party)"]


@pytest.fixture
def model():
    return create_model("c2d_tiny", num_classes=4, width=0.25).eval()


@pytest.fixture
def clip():
    return torch.rand(2, 3, 4, 32, 32)


def test_orders_of_a_list():
    assert alphabetical(LIST) == ["abseiling", "celebrating (party)", "making tea", "zumba"]
    assert first_appearance(LIST) == ["zumba", "making tea", "abseiling", "celebrating (party)"]


def test_numbers_with_quoted_names():
    numbers = {'"making tea"': 1, "abseiling": 0, '"eating ice cream"': 2}
    assert by_number(numbers) == ["abseiling", "making tea", "eating ice cream"]
    with pytest.raises(ValueError, match=r"expected the numbers 0 to 1, got \[0, 2\]"):
        by_number({"a": 0, "b": 2})


def test_spellings_of_published_lists():
    theirs = ["celebrating (party)", "dancing gangnam style", "driver's seat"]
    ours = ["driver's_seat", "celebrating_party", "dancing_gangnam_style"]
    assert class_rows(theirs, ours) == [2, 0, 1]
    with pytest.raises(ValueError, match="got 'zumba'; pass the names of the checkpoint's own"):
        class_rows(theirs, ["zumba"])
    with pytest.raises(ValueError, match="got 'a b' twice"):
        class_rows(["a b", "a_b"], ["a b"])


def test_logits_follow_their_classes(model, clip):
    """A network trained in the order of the list answers in that of the alphabet."""
    theirs, ours = first_appearance(LIST), alphabetical(LIST)
    before = dict(zip(theirs, model(clip).unbind(1), strict=True))
    after = dict(
        zip(ours, take_classes(model, class_rows(theirs, ours))(clip).unbind(1), strict=True)
    )
    for name in ours:
        torch.testing.assert_close(after[name], before[name])
    take_classes(model, class_rows(ours, theirs))
    again = dict(zip(theirs, model(clip).unbind(1), strict=True))
    assert all(torch.equal(again[name], after[name]) for name in ours)


def test_copied_and_fresh_rows(model):
    old = model.fc
    weight, bias = old.weight.clone(), old.bias.clone()
    take_classes(model, [None, 3, *[None] * 50, 0], generator=torch.Generator().manual_seed(5))
    assert torch.equal(model.fc.weight[[1, 52]], weight[[3, 0]])
    assert torch.equal(model.fc.bias[[1, 52]], bias[[3, 0]])
    fresh = model.fc.weight[2:52]
    assert 0.008 < float(fresh.detach().std()) < 0.012
    assert not model.fc.bias[2:52].any()
    assert model.fc.weight.requires_grad
    again = create_model("c2d_tiny", num_classes=4, width=0.25)
    take_classes(again, [None] * 53, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.fc.weight[2:52], fresh)


def test_dtype_mode_and_gradients_stay(model):
    model.double().requires_grad_(False)
    take_classes(model, [0, None])
    assert model.fc.weight.dtype == torch.float64
    assert not model.fc.training
    assert not model.fc.bias.requires_grad


ERRORS = {
    "beyond": ([0, 4, -1], ValueError, r"expected rows from 0 to 3, got \[4, -1\]"),
    "none": ([], ValueError, "expected rows from 0 to 3, got none"),
    "names": (["zumba"], TypeError, "expected rows to be ints or None"),
    "flags": ([True], TypeError, "expected rows to be ints or None"),
}


@pytest.mark.parametrize(("rows", "error", "part"), ERRORS.values(), ids=ERRORS)
def test_rows_that_do_not_exist(model, rows, error, part):
    before = model.fc
    with pytest.raises(error, match=part):
        take_classes(model, rows)
    assert model.fc is before


def test_a_model_without_classifier():
    with pytest.raises(TypeError, match="expected a model with a linear layer 'fc'"):
        take_classes(torch.nn.ReLU(), [0])
