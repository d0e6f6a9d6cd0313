"""Weights that a training starts from: a checkpoint of any published system, or one of ours."""

from torch import nn

from nlkernels.models import files
from nlkernels.models.convert import load_foreign
from nlkernels.models.weights import is_ours

# Contents of a checkpoint of ours beside its weights; see checkpoint.py.
_OF_TRAININGS = {"format", "step", "config"}


def start_from(model: nn.Module, path: str) -> str:
    """Load a checkpoint's weights into a fresh network.

    Blocks, gates and classifier keep their fresh values where the checkpoint has none, and the
    classifier where it has another number of classes. Convolutions of images are repeated over
    time.

    Args:
        model: A registered network; changed in place.
        path: A checkpoint of a published system, of ``nlk convert`` or of ``nlk train``.

    Returns:
        What was loaded, and what starts fresh.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Weights of another network. The model is as it was.
    """
    file = files.read(path)
    if is_ours(file) or set(file.metadata) >= _OF_TRAININGS:
        return _start_from_ours(model, path, file.state)
    report = load_foreign(model, file.state, new=("blocks", "classifier"))
    return _line(path, report.system, len(report.matched), len(report.new))


def _start_from_ours(model: nn.Module, path: str, state: dict) -> str:
    own = model.state_dict()
    fitting = {
        key: value for key, value in state.items() if key in own and value.shape == own[key].shape
    }
    differing = [
        key for key in {**own, **state} if key not in fitting and not _may_be_new(key, state)
    ]
    if differing:
        key = differing[0]
        found = tuple(state[key].shape) if key in state else "missing"
        raise ValueError(
            f"model.weights: expected the weights of this network in {path}, got {key} {found} and "
            f"{len(differing)} differences in all; use the model section of their config"
        )
    model.load_state_dict({**own, **fitting})
    return _line(path, "nlkernels", len(fitting), len(own) - len(fitting))


def _may_be_new(key: str, state: dict) -> bool:
    """Whether an entry of the model may start fresh beside the weights of a checkpoint."""
    if key.startswith("fc."):
        return True
    return key not in state and bool({"nl", "gate"} & set(key.split(".")))


def _line(path: str, system: str, loaded: int, fresh: int) -> str:
    return f"weights: {loaded} tensors of {path} ({system}), {fresh} start fresh"
