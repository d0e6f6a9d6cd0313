"""What holds of pointwise products and their sums in every backend."""

import torch

from nlkernels.ops.pointwise import reference


def assert_bad_number_touches_its_position_only(backend, sources, shift, base, maps, value):
    """Of operands (2,40,(24,8),20), the sources' depths in brackets."""
    clean = backend.product(sources, shift, base, maps)
    products, sums = backend.outer(base, sources[0][0])
    sources[1][0][1, 7, 3] = value
    base[0, 9, 4] = value
    dirty = backend.product(sources, shift, base, maps)
    touched = torch.zeros_like(base, dtype=torch.bool)
    touched[1, 7] = touched[0, 9, 4] = True
    assert not dirty[touched].isfinite().any()
    assert torch.equal(dirty[~touched], clean[~touched])
    again = backend.outer(base, sources[0][0])
    others = [channel for channel in range(20) if channel != 4]
    assert not again[0][4].isfinite().any() and not again[1][4].isfinite()
    assert torch.equal(again[0][others], products[others])
    assert torch.equal(again[1][others], sums[others])


def assert_float16_is_added_in_float32(backend, left, right):
    """Of numbers so large that sums of 16 bits are infinite; left and right have 16 channels."""
    truth = reference.outer(left.double(), right.double())
    for got, exact in zip(backend.outer(left, right), truth, strict=True):
        assert exact.max() > 65504 / 10
        assert (got - exact).abs().max() <= 1e-6 * exact.max()
    weight = torch.full((5, 16), 60.0, dtype=torch.float16, device=left.device)
    out = backend.product([(left, weight), (left, -weight)])
    assert (left.float() @ weight.float().mT).max() > 65504 and out.abs().max() <= 1
