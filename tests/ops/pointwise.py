"""What holds of pointwise products and their sums in every backend."""

import torch

from nlkernels.ops.pointwise import reference

LAYOUTS = ("rows", "maps", "apart", "slice", "items_inside", "unaligned")


def laid_out(x, layout):
    """The same features (B,N,C) in other memory, NaN around them."""
    batch, positions, channels = x.shape
    if layout == "maps":
        return x.mT.contiguous().mT
    if layout == "apart":
        place = x.new_full((batch, positions + 2, 3 * channels), float("nan"))[:, 1:-1, 1::3]
    elif layout == "slice":
        place = x.new_full((2 * batch, channels + 5, positions + 3), float("nan"))
        place = place[::2, 2 : channels + 2, 1 : positions + 1].mT
    elif layout == "items_inside":
        place = x.new_empty(positions, channels, batch).permute(2, 0, 1)
    elif layout == "unaligned":
        place = x.new_full((x.numel() + 1,), float("nan"))[1:].view(x.shape)
    else:
        return x
    return place.copy_(x)


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
