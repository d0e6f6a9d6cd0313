"""TensorBoard and Weights & Biases: optional, imported only where a configuration asks for them."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from .config import Config, to_dict


class Extra(Protocol):
    """Another place for the numbers of a run."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take numbers by name, those of one step."""

    def close(self) -> None:
        """Write what is still to be written."""


def check_extras(config: Config) -> None:
    """Raise ImportError if a package is missing that the configuration asks for."""
    for key, wanted, package in (
        ("run.tensorboard", config.run.tensorboard, "tensorboard"),
        ("run.wandb", config.run.wandb is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"run: expected the package {package} for {key}, got none; "
                f"pip install 'nlkernels[{package}]'"
            )


def open_extras(config: Config, out: Path, name: str) -> list[Extra]:
    """What the configuration asks for, opened.

    Args:
        config: ``run.tensorboard``, ``run.wandb``; all of it is told to Weights & Biases.
        out: The run folder; both write into it.
        name: Name of the training.
    """
    extras: list[Extra] = []
    if config.run.tensorboard:
        extras.append(_TensorBoard(out / "tensorboard" / name))
    if config.run.wandb is not None:
        extras.append(_Wandb(config, out, name))
    return extras


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config, out: Path, name: str) -> None:
        import wandb

        self._run = wandb.init(
            project=config.run.wandb,
            name=f"{out.name}-{name}",
            dir=str(out),
            config=to_dict(config),
        )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
