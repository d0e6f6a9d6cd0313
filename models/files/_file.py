"""What is read from a checkpoint, whatever its format."""

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class File:
    """The content of a checkpoint.

    Attributes:
        state: weights by key, as the system that saved them names them but without "module.".
        metadata: numbers and texts that stood beside the weights, as lr, epoch or a licence.
        format: "caffe2", "torch", "safetensors" or "mindspore".
        entry: where in the file the weights were, as "blobs" or "model_state"; "" for the top.
        others: entries with other weights, as those of an exponential moving average;
            `read(path, entry=...)` gives them.
        extra: tensors that are no weights: the momenta of a Caffe2 checkpoint.
    """

    state: dict[str, torch.Tensor]
    metadata: dict[str, Any]
    format: str
    entry: str = ""
    others: tuple[str, ...] = ()
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
