"""An operation whose backend "triton" a test chooses, on CPU tensors that pass for a GPU's.

Also run as a program, by the tests that need another process: see `main`.
"""

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from nlkernels import _cache, _device, _operations, _select, _trust, _tune, _warmup
from nlkernels._launch import Config
from nlkernels._spec import Problem
from nlkernels.ops.softmax import chunked, reference, suite

DTYPES = ("float16", "bfloat16", "float32")
TABLE = {"cpu": ({"dtypes": DTYPES, "order": ("triton", "chunked"), "because": "in this test"},)}
SMALL = Problem(2, 9, 7, 16, 16, torch.float32, "cpu")


SLOW, FAST, HUGE = Config(16, 16), Config(32, 32), Config(64, 64)


class OutOfResources(Exception):
    """By the name of Triton's own error."""


def kernel(ran: list[Config] | None = None, seconds: float = 0.002):
    """A launcher that is slow in SLOW and does not fit in HUGE."""

    def run(config: Config) -> None:
        if ran is not None:
            ran.append(config)
        if config == HUGE:
            raise OutOfResources("shared memory")
        if config == SLOW:
            time.sleep(seconds)

    return run


def forget() -> None:
    """Drop whatever this process remembers of verification and measurement."""
    _cache.forget()
    _cache._warn.cache_clear()
    _tune._fitting.clear()
    _warmup._tried.clear()
    _trust._postponed.clear()


def right() -> SimpleNamespace:
    """A backend that is right: the chunked one under another name."""
    return SimpleNamespace(forward=chunked.forward, backward=chunked.backward)


def forward_only(wrong: Callable) -> SimpleNamespace:
    """A backend whose forward is wrong(query, key, value, scale) -> out, stats."""

    def forward(query, key, value, scale, workspace_mib=None):
        return wrong(query, key, value, scale)

    return SimpleNamespace(forward=forward, backward=chunked.backward)


def forgets_a_key_tile() -> SimpleNamespace:
    def forward(query, key, value, scale):
        seen = key.shape[1] - 16 if key.shape[1] > 1000 else key.shape[1]
        return chunked.forward(query, key[:, :seen], value[:, :seen], scale)

    return forward_only(forward)


def ignores_the_sign_of_scale() -> SimpleNamespace:
    return forward_only(lambda q, k, v, scale: chunked.forward(q, k, v, abs(scale)))


def wrong_where_keys_fill_their_tiles() -> SimpleNamespace:
    def forward(query, key, value, scale):
        seen = key.shape[1] - (key.shape[1] % 64 == 0)
        return chunked.forward(query, key[:, :seen], value[:, :seen], scale)

    return forward_only(forward)


def wrong_for_channel_first() -> SimpleNamespace:
    def forward(query, key, value, scale):
        if query.stride(2) != 1:
            value = value.roll(1, 1)
        return chunked.forward(query, key, value, scale)

    return forward_only(forward)


def drops_the_last_channel() -> SimpleNamespace:
    def forward(query, key, value, scale):
        last = query.shape[2] - query.shape[2] % 2
        return chunked.forward(query[..., :last], key[..., :last], value, scale)

    return forward_only(forward)


def keeps_wrong_statistics() -> SimpleNamespace:
    def forward(query, key, value, scale, workspace_mib=None):
        out, stats = chunked.forward(query, key, value, scale)
        return out, stats * torch.tensor([1.0, 1.01]).view(2, 1, 1)

    def backward(grad, query, key, value, out, stats, scale, workspace_mib=None):
        top, total = (part.unsqueeze(-1) for part in stats)
        weights = ((query @ key.mT - top) * scale).exp() / total
        d_scores = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
        return d_scores @ key, d_scores.mT @ query, weights.mT @ grad

    return SimpleNamespace(forward=forward, backward=backward)


def wrong_in_another_configuration() -> SimpleNamespace:
    def forward(query, key, value, scale):
        ran = []
        problem = Problem.of(query, key, value)
        _tune.run_best("fake_kernel", problem, query.device, (FAST, SLOW), ran.append)
        return chunked.forward(query, key, value, scale * (1 if ran[-1] == FAST else 1.1))

    return forward_only(forward)


def d_key_without_scale() -> SimpleNamespace:
    def backward(*arguments):
        d_query, d_key, d_value = chunked.backward(*arguments)
        return d_query, d_key / arguments[-2], d_value

    return SimpleNamespace(forward=chunked.forward, backward=backward)


def not_repeatable() -> SimpleNamespace:
    calls = []

    def forward(*arguments):
        out, stats = chunked.forward(*arguments)
        calls.append(None)
        return (out.nextafter(out + 1) if len(calls) % 2 else out), stats

    return SimpleNamespace(forward=forward, backward=chunked.backward)


def raises() -> SimpleNamespace:
    def forward(*arguments):
        raise RuntimeError("misaligned\naddress")

    return SimpleNamespace(forward=forward, backward=chunked.backward)


def leaves_a_row_unwritten() -> SimpleNamespace:
    def forward(*arguments):
        out, stats = chunked.forward(*arguments)
        left = torch.empty_like(out)
        left[:, :-1] = out[:, :-1]
        return left, stats

    return SimpleNamespace(forward=forward, backward=chunked.backward)


def call(backend: str, query, key, value):
    return reference.attention(query, key, value, query.shape[2] ** -0.5)


def operation(backend: SimpleNamespace) -> _operations.Operation:
    """The operation, to be registered as "fake"."""
    names = {name: getattr(suite, name) for name in dir(suite) if not name.startswith("__")}
    return _operations.Operation(
        ("reference", "chunked", "triton"),
        lambda name, problem: [],
        {"chunked": chunked, "triton": backend},
        TABLE,
        suite=SimpleNamespace(**names | {"call": call}),
    )


def install(backend: Callable[[], SimpleNamespace], setitem=dict.__setitem__, setattr=setattr):
    """Register the operation, and let CPUs be devices whose kernels are verified and measured."""
    setitem(_operations.OPERATIONS, "fake", operation(backend()))
    setattr(_device, "MEASURED", ("cpu",))


def main() -> None:
    """`choose BACKEND`: what auto takes, as it is and after a change of the sources.

    `write NAME COUNT`: add that many entries to the cache, one after the other.
    """
    command, name, *rest = sys.argv[1:]
    if command == "choose":
        install(globals()[name])
        print(_select.choose("fake", SMALL), _select.against("fake", "triton", SMALL))
        _cache.forget()
        _cache.package_hash = lambda folder=".": "changed"
        print(_select.against("fake", "triton", SMALL))
    else:
        for number in range(int(rest[0])):
            entry = {"config": [16, 16, 0, 4, 2, False, False], "ms": 1.0}
            _cache.update(torch.device("cpu"), "configs", {f"{name} {number}": entry})


if __name__ == "__main__":
    main()
