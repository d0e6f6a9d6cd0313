"""Where kernels can run, what a tile may be, and the launch: all of it without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nlkernels import _launch
from nlkernels._launch import Config

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CONFIG = Config(64, 32, warps=8, stages=3)


def record(launches: list):
    return lambda *launch: launches.append(launch)


# Tensor descriptors: what the copy engine can read.


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 64, 196), torch.bfloat16, "392 bytes"),
        ((2, 64, 196), torch.float16, "392 bytes"),
        ((2, 64, 196), torch.float32, ""),
        ((2, 64, 392), torch.bfloat16, ""),
        ((2, 64, 784), torch.bfloat16, ""),
        ((2, 64, 49), torch.float32, "196 bytes"),
        ((2, 3, 8), torch.bfloat16, ""),
        ((2, 3, 4), torch.bfloat16, "24 bytes"),
        ((2, 3, 4), torch.float32, ""),
    ],
    ids=str,
)
def test_channel_first_keys(shape, dtype, reason):
    """(B,C,M) storage seen as keys (B,M,C): M decides the stride of a channel."""
    keys = torch.empty(shape, dtype=dtype).transpose(1, 2)
    assert reason in _launch.undescribable(keys, 1)
    assert bool(reason) == bool(_launch.undescribable(keys, 1))
    assert "stride" in _launch.undescribable(keys, 2)


def test_innermost_dimension_has_stride_1():
    rows = torch.empty(2, 32, 64)
    assert _launch.undescribable(rows) == ""
    assert _launch.undescribable(rows, 2) == ""
    assert "dimension 1 has stride 64, not 1" in _launch.undescribable(rows, 1)
    assert "dimension -1 has stride 2, not 1" in _launch.undescribable(rows[..., ::2])


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_address_is_a_multiple_of_16_bytes(offset):
    rows = torch.empty(4 + 32 * 64)[offset : offset + 32 * 64].view(1, 32, 64)
    assert rows.data_ptr() % 16 == 4 * offset % 16
    assert ("address" in _launch.undescribable(rows)) == bool(offset % 4)


def test_expanded_dimensions_are_refused():
    assert "0 bytes" in _launch.undescribable(torch.empty(1, 32, 64).expand(4, 32, 64))
    assert "0 bytes" in _launch.undescribable(torch.empty(2, 1, 64).expand(2, 32, 64))


@pytest.mark.parametrize(
    ("shape", "stride", "fits"),
    [
        ((2, 8, 64), (2**38 - 4, 64, 1), True),
        ((2, 8, 64), (2**38, 64, 1), False),
        ((1, 2**32, 64), (64, 0, 1), False),
        ((2**32, 8, 64), (512, 64, 1), True),
        ((2**32 + 1, 8, 64), (512, 64, 1), False),
        ((2, 0, 64), (64, 64, 1), False),
    ],
    ids=str,
)
def test_sizes_and_strides_of_descriptors(shape, stride, fits):
    tensor = torch.empty_strided(shape, stride, device="meta")
    assert (_launch.undescribable(tensor) == "") == fits


def test_undescribable_agrees_with_triton():
    tools = pytest.importorskip("triton.tools.tensor_descriptor", reason="triton is not installed")
    base = torch.empty(1 << 14, dtype=torch.bfloat16)
    for offset in (0, 1, 8):
        for stride in (64, 68, 72, 0):
            rows = base.as_strided((8, 64), (stride, 1), offset)
            try:
                tools.TensorDescriptor.from_tensor(rows, [8, 64])
            except AssertionError:
                assert _launch.undescribable(rows), (offset, stride)
            else:
                # A stride of zero passes there; the driver refuses it.
                assert _launch.undescribable(rows) == "" or stride == 0, (offset, stride)


# 64-bit offsets.


@pytest.mark.parametrize(
    ("shape", "stride", "wide"),
    [
        ((1, 2**31 - 1), (2**31, 1), False),
        ((1, 2**31), (2**31, 1), True),
        ((2, 1), (2**31 - 2, 1), False),
        ((2, 1), (2**31 - 1, 1), True),
        ((2, 2), (2**31 - 1, 1), True),
        ((3, 5), (2**30, 1), True),
        ((0, 2**33), (2**33, 1), False),
        ((2**20, 2**20), (0, 0), False),
        ((), (), False),
    ],
    ids=str,
)
def test_wide_at_the_extent(shape, stride, wide):
    """What counts is how far apart elements lie, not how many there are."""
    tensor = torch.empty_strided(shape, stride, device="meta")
    assert _launch.wide(tensor) == wide


def test_wide_asks_every_tensor():
    small = torch.empty(4, 4)
    large = torch.empty(1, device="meta").expand(2**40).as_strided((2, 2), (2**31, 1))
    assert not _launch.wide(small, small)
    assert _launch.wide(small, large)
    assert not _launch.wide(torch.empty(1).expand(2**40))


def test_wide_can_be_forced():
    with _launch.pretend(wide=True):
        assert _launch.wide(torch.empty(1))
    with _launch.pretend(wide=False):
        assert not _launch.wide(torch.empty(2**20, 2**20, device="meta"))
    assert not _launch.wide(torch.empty(1))


# Pretending, and the launch.


def test_pretences_nest_and_end():
    outside = _launch.architecture(CPU)
    with _launch.pretend(architecture=80, wide=True):
        assert _launch.architecture(CPU) == 80
        assert not _launch.has_descriptors(CPU)
        with _launch.pretend(architecture=120):
            assert _launch.architecture(CPU) == 120
            assert _launch.has_descriptors(CPU)
            assert not _launch.wide(torch.empty(1)), "an inner pretence stands alone"
        with pytest.raises(RuntimeError, match="inside"), _launch.pretend(architecture=89):
            raise RuntimeError("inside")
        assert _launch.architecture(CPU) == 80
        assert _launch.wide(torch.empty(1))
    assert _launch.architecture(CPU) == outside
    assert not _launch.wide(torch.empty(1))


def test_launcher_gets_what_a_launch_would():
    launches, tensor = [], torch.empty(4)
    with _launch.pretend(launcher=record(launches)):
        _launch.launch("kernel", (2, 3), tensor, 7, config=CONFIG, scratch=True, SIZE=16)
    options = {"SIZE": 16, "num_warps": 8, "num_stages": 3}
    assert launches == [("kernel", (2, 3), (tensor, 7), options)]


class Kernel:
    """Remembers how it was called, as a function under triton.jit would be."""

    def __init__(self) -> None:
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


@pytest.mark.parametrize("grid", [(0,), (0, 4), (3, 0, 2)], ids=str)
def test_an_empty_grid_launches_nothing(grid):
    kernel = Kernel()
    _launch.launch(kernel, grid, torch.empty(0), config=CONFIG)
    assert kernel.calls == []


def test_a_launch_passes_arguments_and_options():
    kernel, tensor = Kernel(), torch.empty(4)
    _launch.launch(kernel, (2,), tensor, 5, config=CONFIG, SIZE=16)
    assert kernel.calls == [((2,), (tensor, 5), {"SIZE": 16, "num_warps": 8, "num_stages": 3})]


# Where no kernel can run, and what is said.


def test_unavailable_without_triton(monkeypatch):
    monkeypatch.setattr(_launch, "installed", lambda: False)
    for device in ("cpu", "cuda", "mps"):
        assert _launch.unavailable(device) == ["the package triton is not installed"]
    assert not _launch.interpreting()


def test_everything_else_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it fails, finding it finds nothing
import torch
import nlkernels
query, key, value = (torch.randn(2, n, 8) for n in (9, 5, 5))
for kind in ("softmax", "gaussian", "dot_product", "relu"):
    nlkernels.nonlocal_attention(query, key, value, kind=kind)
print(nlkernels.explain("nonlocal_attention", query, key, value))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the package triton is not installed" in done.stdout


def test_unavailable_on_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(_launch, "installed", lambda: True)
    monkeypatch.setattr(_launch, "interpreting", lambda: False)
    assert _launch.unavailable("cpu") == ["its kernels run on GPUs, not on cpu"]
    assert _launch.unavailable("mps") == ["its kernels run on GPUs, not on mps"]
    with _launch.pretend(launcher=record([])):
        assert _launch.unavailable("cpu") == []
    monkeypatch.setattr(_launch, "interpreting", lambda: True)
    assert _launch.unavailable("cpu") == []
    assert _launch.unavailable("mps") == ["its kernels run on GPUs, not on mps"]


@pytest.mark.parametrize(
    ("architecture", "reasons"),
    [
        (70, ["its kernels need compute capability 8.0, this GPU has 7.0"]),
        (75, ["its kernels need compute capability 8.0, this GPU has 7.5"]),
        (80, []),
        (90, []),
        (120, []),
    ],
)
def test_compute_capability(architecture, reasons, monkeypatch):
    monkeypatch.setattr(_launch, "installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    with _launch.pretend(architecture=architecture):
        assert _launch.unavailable("cuda") == reasons


def test_amd_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(_launch, "installed", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _launch.unavailable("cuda") == ["its kernels are written for NVIDIA GPUs"]


def test_precision_follows_the_switch_of_torch():
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        strict = _launch.precision(torch.float32)
        torch.set_float32_matmul_precision("high")
        assert _launch.precision(torch.float32) == "tf32"
        assert strict != "tf32"
    finally:
        torch.set_float32_matmul_precision(was)
    assert _launch.precision(torch.bfloat16) == "ieee"


def test_capturing():
    def add(x):
        return x + _launch.capturing(CPU)

    assert add(torch.ones(1)) == 1
    assert torch.compile(add, backend="eager", fullgraph=True)(torch.ones(1)) == 2
