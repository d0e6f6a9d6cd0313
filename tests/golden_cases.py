"""Golden cases: files of expected numbers whose weights and inputs are generated, not stored."""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

# What systems call a kind -> kind.
KINDS = {
    "embedded_gaussian": "softmax",
    "embedded": "softmax",
    "softmax": "softmax",
    "gaussian": "gaussian",
    "dot_product": "dot_product",
    "dot": "dot_product",
    "concatenation": "concat",
}


class GoldenCase(NamedTuple):
    """One file: what it says, the other system's state dict, and the inputs, all in float32."""

    record: Mapping[str, Any]
    state: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]


def block_files(folder: Path) -> list[Path]:
    """The files of single blocks in a folder."""
    return files(folder, "block")


def files(folder: Path, kind: str) -> list[Path]:
    """The files of a kind in a folder: "block", "model" or "conversion"."""
    return [path for path in sorted(folder.glob("*.json")) if _record(path)["kind"] == kind]


def load(path: Path) -> GoldenCase:
    """Read a file and generate its tensors.

    Raises:
        ValueError: the tensors are not those that the file was made with.
    """
    record = _record(path)
    state = {key: parameter(key, tuple(shape), rule) for key, shape, rule in record["state"]}
    inputs = {
        entry["name"]: normal(entry["name"], tuple(entry["shape"])) * np.float32(entry["scale"])
        for entry in record["inputs"]
    }
    checksum = 0
    for tensor in (*state.values(), *inputs.values()):
        little = tensor.astype(tensor.dtype.newbyteorder("<"), copy=False)
        checksum = zlib.crc32(little.tobytes(), checksum)
    if checksum != record["crc32"]:
        raise ValueError(
            f"{path.name}: expected tensors of checksum {record['crc32']}, got {checksum}; "
            "this numpy draws other random numbers"
        )
    return GoldenCase(record, state, inputs)


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers that depend on name and shape only."""
    return _generator(name).standard_normal(shape).astype(np.float32)


def parameter(key: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A parameter or statistic by its key, shape and kind: a rule and, after "*", a gain."""
    rule, _, gain = kind.partition("*")
    if rule == "count":
        return np.zeros(shape, np.int64)
    numbers = _drawn(rule, _generator(key), shape)
    return (numbers * float(gain or 1)).astype(np.float32)


def cotangent(out: torch.Tensor) -> torch.Tensor:
    """The gradient that the files' gradients start from."""
    return torch.from_numpy(normal("grad", tuple(out.shape))).to(out)


def deviation(digest: Mapping[str, Any], tensor: torch.Tensor) -> float:
    """How far a tensor is from a digest, relative to the digest's scale; NaN stays NaN.

    Raises:
        ValueError: another shape.
    """
    array = tensor.detach().cpu().double().numpy()
    if list(array.shape) != digest["shape"]:
        raise ValueError(f"digest: expected shape {digest['shape']}, got {array.shape}")
    sample = np.asarray(digest["values"], np.float64)
    # All numbers when as many are stored, else an even walk from the first to the last.
    steps = np.arange(sample.size) * (array.size - 1) // max(sample.size - 1, 1)
    errors = [
        np.abs(array.ravel()[steps] - sample).max(),
        abs(array.mean() - digest["mean"]),
        abs(array.std() - digest["std"]),
    ]
    return float(np.max(errors)) / digest["scale"]


def _record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def _drawn(rule: str, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if rule in ("weight", "weight_masked"):
        numbers = generator.standard_normal(shape) * math.sqrt(1 / math.prod(shape[1:]))
        return numbers * _own_channel(shape) if rule == "weight_masked" else numbers
    if rule in ("bias", "bn_bias", "running_mean"):
        return generator.standard_normal(shape) * 0.1
    if rule in ("bn_weight", "running_var"):
        return generator.random(shape) + 0.5
    if rule == "mask":
        return _own_channel(shape)
    raise ValueError(f"golden case: expected a known rule, got {rule!r}; is the file newer?")


def _own_channel(shape: tuple[int, ...]) -> np.ndarray:
    """1 where output channel o meets input channel o of its group, and 0 elsewhere."""
    outputs, inputs = np.ogrid[: shape[0], : shape[1]]
    own = (outputs % shape[1] == inputs).astype(np.float64)
    return np.broadcast_to(own.reshape(*shape[:2], *(1,) * (len(shape) - 2)), shape)


def assert_same_state(exported, state):
    """Keys, shapes, dtypes and values; of RNL's dense weight the part that its mask keeps."""
    assert exported.keys() == state.keys()
    for key, array in state.items():
        if key.endswith("penta.weight"):
            array = array * state[key.removesuffix("weight") + "mask"]
        np.testing.assert_array_equal(exported[key].numpy(), array, strict=True, err_msg=key)
