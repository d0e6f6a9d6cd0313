"""What the tests of the gate's GPU kernels share, whoever wrote the kernels."""

import pytest
import torch

from nlkernels.ops.gate import suite
from tests.helpers import DEVICE
from tests.ops.test_gate import NAMES, assert_right, moved, results, run, tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# One, two and three axes of positions, one position, channels that leave tails and that do not.
CASES = [
    ((2, 17, 3, 7, 3), "fp32"),
    ((2, 40, 2, 9, 14), "bf16"),
    ((3, 8, 1, 1, 1), "fp16"),
    ((2, 64, 3, 5), "bf16"),
    ((4, 5, 65), "fp16"),
    ((1, 520, 2, 3, 3), "fp32"),
]

layouts = pytest.mark.parametrize("layout", suite.LAYOUTS)


def operands(shape, dtype=torch.float32, layout="ncdhw", mean=0.0):
    return tensors(shape, dtype, layout, DEVICE, mean)


def direct(kernels, x, weight, grad):
    """Results of a backend's module itself, without dispatch."""
    out = kernels.forward(x, weight)
    return dict(zip(NAMES, (out, *kernels.backward(grad, x, weight, out)), strict=True))


def check_case(backend, shape, dtype, layout, mean):
    given = operands(shape, DTYPES[dtype], layout, mean)
    assert assert_right(run(backend), given)["d_x"].stride() == given[0].stride()


def check_strides(backend, how):
    x, weight, grad = operands((2, 5, 2, 3, 4), torch.bfloat16)
    weight, grad = (torch.stack((t, t), -1)[..., 0] for t in (weight, grad))
    assert_right(run(backend), [moved(x, how), weight, grad])


def check_expanded(backend):
    x, weight, grad = operands((1, 4, 2, 3, 3))
    x = x[..., :1].expand(2, -1, -1, -1, 3)
    assert_right(run(backend), [x, weight[:1].expand(4), grad.sum().expand(2, 4)])


def check_empty(backend):
    got = results(run(backend), *operands((0, 3, 2, 4, 4)))
    assert got["out"].shape == (0, 3) and got["d_x"].shape == (0, 3, 2, 4, 4)
    assert got["d_weight"].shape == (3,) and not got["d_weight"].any()


def check_extremes(backend, layout="ncdhw"):
    x, weight, grad = operands((4, 16, 2, 3, 7), layout=layout)
    x[0] *= 1e4  # huge logits
    x[1] = 3.0  # all positions alike
    x[2, :, 1, 2, 3] = 60 * weight.sign()  # one position wins
    x[3] *= 1e-6  # all shares alike
    got = results(run(backend), x, weight, grad)
    assert all(t.isfinite().all() for t in got.values())
    assert_right(run(backend), [x[1:], weight, grad[1:]])


def check_largest(backend):
    x, weight, grad = operands((1, 4, 5, 10, 20))
    x = x.sign() * 1e36
    got = results(run(backend), x, weight * 0, grad)
    truth = results(run("reference"), *(t.double() for t in (x, weight * 0, grad)))
    # The weight's gradient is beyond float32; in out, numbers of both signs cancel.
    for name, largest in (("out", 1e36), ("d_x", truth["d_x"].abs().max())):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * torch.finfo(x.dtype).eps * largest


def check_bad_number(kernels, value, layout="ncdhw"):
    x, weight, grad = operands((3, 4, 2, 3, 5), layout=layout)
    weight[2] = abs(weight[2])
    clean = direct(kernels, x, weight, grad)
    x[1, 2, 1, 2, 2] = value
    dirty = direct(kernels, x, weight, grad)
    truth = results(run("reference"), x.double(), weight.double(), grad.double())
    assert torch.equal(dirty["out"].isnan(), truth["out"].isnan())
    for item in (0, 2):
        assert torch.equal(dirty["out"][item], clean["out"][item])
        assert torch.equal(dirty["d_x"][item], clean["d_x"][item])
