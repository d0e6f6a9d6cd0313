"""Section ``run`` of a configuration: folder, seed, device, logs, checkpoints, tests on the way."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run happens."""

    out: str | None = None
    """Folder of everything the run writes; unset is ``runs/NAME-OF-THE-CONFIG``."""
    seed: int = 0
    """Seed of initial weights, data order and dropout (``nlk train``)."""
    device: str = "auto"
    """``auto`` takes a GPU per process if there are any; else a torch device name."""
    log_every: int = 50
    """Steps between two progress lines; every step is in the JSONL file."""
    threads: int | None = None
    """CPU threads of torch; unset keeps torch's choice."""
    unit: Literal["step", "epoch"] = "step"
    """Unit of checkpoint_every and test_every; an epoch is a pass over the training clips."""
    checkpoint_every: int | None = None
    """Distance of two checkpoints; unset saves the final one only."""
    keep: int = 1
    """Checkpoints that are kept: from 2 on, older ones stay as ``NAME-STEP.pt`` beside the last."""
    test_every: int | None = None
    """Distance of two tests; unset tests at the end only."""
    resume: str | None = None
    """Checkpoint file to continue from, or ``auto``: the newest one in the run folder if it has
    any (``nlk train``)."""
    colour_check: bool = False
    """Also report the accuracy of a classifier that sees only each clip's mean colour."""
    tensorboard: bool = False
    """Also write what is logged for TensorBoard, into the run folder."""
    wandb: str | None = None
    """Project of Weights & Biases that also gets what is logged; unset is none."""


MINIMUM = {
    "run.log_every": 1,
    "run.threads": 1,
    "run.checkpoint_every": 1,
    "run.keep": 1,
    "run.test_every": 1,
}
IGNORED_WHEN = (("run.keep", "run.checkpoint_every", lambda every: every is None),)


def check_run(run: RunConfig) -> None:
    """Raise ValueError for values of the section that cannot work."""
    if not 0 <= run.seed < 2**63:
        raise ValueError(
            f"config: expected 0 <= run.seed < 2**63, got {run.seed}; give a number from 0"
        )
    if run.resume == "" or run.wandb == "":
        key = "resume" if run.resume == "" else "wandb"
        raise ValueError(
            f"config: expected run.{key} to be a name, got an empty text; leave it unset"
        )
