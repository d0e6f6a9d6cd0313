"""A small kernel, compiled ahead of time in a process of its own: prints what was found as JSON."""

import json

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gates import compiling


@triton.jit
def toy(x, y, box, count, stride, one, factor, SIZE: tl.constexpr, OFF: tl.constexpr):
    at = tl.arange(0, SIZE)
    numbers = tl.load(x + at * one, mask=at < count, other=0.0)
    tile = box.load([0, 0])
    tl.store(y + at * stride, numbers * factor)
    tl.store(y + at[:, None] + tl.arange(0, 32)[None, :], tile.to(tl.float32))


def main() -> None:
    x, y = torch.empty(64, dtype=torch.bfloat16), torch.empty(65)[1:]
    box = TensorDescriptor.from_tensor(torch.empty(64, 32, dtype=torch.bfloat16), [64, 32])
    # Aligned, unaligned, a multiple of 16, none, and 1.
    rest = (y, box, 48, 33, 1, 0.5)
    options = {"SIZE": 64, "OFF": False, "num_warps": 4, "num_stages": 2}
    launch = compiling.Launch(90, toy, (x, *rest), options, default=True)
    launches = {
        "first": launch,
        "other memory": launch._replace(arguments=(torch.empty_like(x), *rest)),
        "unaligned": launch._replace(arguments=(x[1:], *rest)),
    }
    wrong = launch._replace(options=options | {"SIZE": 63})
    found = {
        "specialised": {name: compiling.specialisation(each) for name, each in launches.items()},
        "names": {name: compiling.row_name(each) for name, each in launches.items()},
        "rows": [compiling.measure(launch), compiling.measure(launch)],
        "wrong": compiling.measure(wrong),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
