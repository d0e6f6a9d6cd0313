"""What foreign state dicts may hold: other keys, sizes as lists, masks of integers, no memory."""

import numpy as np
import pytest
import torch

from nlkernels import ChannelGate, NonLocalBlock3d


def export_block(preset, prefix=""):
    return NonLocalBlock3d.from_preset(preset, 6).to_foreign(preset, prefix=prefix)


@pytest.mark.parametrize("preset", ["tsm", "rnl"])
def test_sizes_may_be_lists(preset):
    sizes = {"pool": [1, 2, 2]}
    if preset == "rnl":
        sizes["region_kernel"] = [3, 7, 7]
    found = NonLocalBlock3d.from_foreign(export_block(preset), preset, **sizes)
    assert found.pool_size == (1, 2, 2)
    assert found.to_foreign(preset, **sizes).keys() == export_block(preset).keys()


def export_gate(preset, prefix=""):
    return ChannelGate(6).to_foreign(preset, prefix=prefix)


each_importer = pytest.mark.parametrize(
    ("export", "load", "preset"),
    [
        (export_block, NonLocalBlock3d.from_foreign, "tsm"),
        (export_gate, ChannelGate.from_foreign, "rnl"),
    ],
    ids=["block", "gate"],
)


@each_importer
def test_keys_that_are_no_text(export, load, preset):
    state = {("a", 1): 2, None: 3, **export(preset, prefix="nl.")}
    assert load(state, preset, prefix="nl.").dim == 6
    with pytest.raises(TypeError, match=r"expected keys to be str, got \('a', 1\) of tuple; pass"):
        load(state, preset)
    for call in (lambda: load(state, preset, prefix=None), lambda: export(preset, prefix=0)):
        with pytest.raises(TypeError, match=r"expected prefix to be a str, got .*; pass what"):
            call()


@each_importer
def test_import_spends_no_random_number(export, load, preset):
    state = export(preset)
    before = torch.random.get_rng_state()
    load(state, preset)
    assert torch.equal(torch.random.get_rng_state(), before)


@each_importer
def test_values_that_are_no_weights(export, load, preset):
    state = export(preset)
    key = next(key for key in state if key.endswith("weight"))
    for value in ([1.0], None, torch.ones(2, dtype=torch.int64), np.ones(2, bool)):
        with pytest.raises(TypeError, match=f"{key} to be an array or tensor of floating-point"):
            load({**state, key: value}, preset)
    count = next(key for key in state if key.endswith("num_batches_tracked"))
    with pytest.raises(TypeError, match=f"{count} to be an array or tensor of integers, got"):
        load({**state, count: torch.ones(())}, preset)


@pytest.mark.parametrize("size", [(), (6,), (3, 6, 1, 1, 1, 1)], ids=str)
def test_weights_of_no_convolution(size):
    state = export_block("tsm")
    state["g.0.weight"] = torch.ones(size)
    with pytest.raises(ValueError, match=r"1x1 convolutions of 3 dimensions, .*; pass the state"):
        NonLocalBlock3d.from_foreign(state, "tsm")


def test_region_weight_of_other_dimensions():
    state = export_block("rnl")
    state["penta.weight"] = torch.ones(())
    with pytest.raises(ValueError, match=r"a region's weight of 3 dimensions, got one of shape"):
        NonLocalBlock3d.from_foreign(state, "rnl")


@pytest.mark.parametrize("preset", ["tsm", "rnl"])
def test_import_on_the_meta_device(preset):
    state = {key: value.to("meta") for key, value in export_block(preset).items()}
    found = NonLocalBlock3d.from_foreign(state, preset)
    assert {parameter.device.type for parameter in found.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool, np.float16])
def test_masks_of_any_numbers(dtype):
    state = export_block("rnl")
    state["penta.mask"] = state["penta.mask"].numpy().astype(dtype)
    found = NonLocalBlock3d.from_foreign(state, "rnl")
    assert found.region.weight.dtype == torch.float32
    state["penta.mask"][0, 0] = 0
    with pytest.raises(ValueError, match=r"expected penta.mask to be 1 where"):
        NonLocalBlock3d.from_foreign(state, "rnl")
