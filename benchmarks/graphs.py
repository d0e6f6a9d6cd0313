"""CUDA graphs of a call: what it costs without the host's part in every launch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3


class NotCaptured(RuntimeError):
    """A call cannot be recorded as a graph; the message says why."""


def capture(
    call: Callable[[], dict[str, Tensor]], device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    """Record a call as a CUDA graph.

    Args:
        call: Always the same work on the same operands.
        device: Where it runs.

    Returns:
        Replays the graph; returns the tensors that every replay writes.

    Raises:
        NotCaptured: The device has no graphs, or the call does what a graph cannot hold.
    """
    if device.type != "cuda":
        raise NotCaptured(f"there are no CUDA graphs on {device.type}")
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            # Everything that happens once (compilation, handles, choices) happens before capture.
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    call()
            torch.cuda.current_stream(device).wait_stream(side)
            with torch.cuda.graph(graph):
                outputs = call()
            graph.replay()
            torch.cuda.synchronize(device)
    except Exception as error:
        raise NotCaptured(f"{type(error).__name__}: {error}"[:300]) from error

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return outputs

    return replay
