"""Every CUDA kernel on every architecture: no spills, no warnings that cost speed, no growth."""

import shutil

import pytest

from nlkernels import _build, _build_cuda, _env
from tests.gates import cuda_table, table

ROW = "cuda/toy.cu kernel<1> sm_80"
LOG = """
ptxas info    : Compiling entry function '_ZN3nlk4cuda6kernelIfLi4ELb1EEEvNS0_4PassE' for 'sm_80'
ptxas info    : Function properties for _ZN3nlk4cuda6kernelIfLi4ELb1EEEvNS0_4PassE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 232 registers, used 1 barriers, 1024 bytes smem, 640 bytes cmem[0]
"""


def _nvcc() -> str:
    try:
        return _build_cuda.find_nvcc(_env.cuda_homes()).version
    except _build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled() -> list[cuda_table.Compiled]:
    _nvcc()
    return cuda_table.measure([])


@pytest.mark.gate
def test_kernels_fit_their_architectures(compiled):
    limits = cuda_table.limits()
    assert [
        f for each in compiled for f in cuda_table.faults(each, limits[each.architecture])
    ] == []


@pytest.mark.gate
def test_nothing_grew(compiled):
    file = cuda_table.path()
    if not file.is_file():
        pytest.skip(f"no table for {_nvcc()}: python -m tests.gates.cuda_table writes one")
    assert table.regressions(table.read(file), cuda_table.merged(compiled)) == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt, which binutils has")
def test_the_log_is_read():
    found = cuda_table.rows("cuda/toy.cu", "sm_80", LOG)
    numbers = {"registers": 232, "stack": 8, "spilled": 16, "shared": 1024}
    assert found == {"cuda/toy.cu kernel<float, 4, true> sm_80": numbers}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, ""),
        ({"warnings": ("C7515",)}, "ptxas warns of C7515"),
        ({"rows": {}}, "no kernel"),
        ({"seconds": 61.0}, "compiles in 61 s"),
        ({"rows": {ROW: {"registers": 9, "spilled": 16}}}, "16 B of registers spilled"),
        ({"rows": {ROW: {"registers": 9, "shared": 101}}}, "shared memory 101 B > 100 B"),
    ],
)
def test_faults(changed, fault):
    sound = cuda_table.Compiled("cuda/toy.cu", "sm_80", {ROW: {"registers": 9}}, (), 1.0)
    found = cuda_table.faults(sound._replace(**changed), 100)
    assert len(found) == bool(fault) and fault in "".join(found)


def test_units_are_compiled_for_their_architectures():
    jobs = cuda_table.jobs([])
    hopper = [job for job in jobs if "/hopper/" in job[0]]
    assert {architecture for _, architecture in hopper} <= {"sm_90a"}
    assert ("cuda/attention_float16.cu", "sm_75") in jobs
