"""Every field of the kinds of ``report.json``, with its meaning; a check that they agree.

``[]`` marks a list of objects. ``COMPARISON`` is written by ``nlk compare``, ``COSTS`` by
``nlk compare --measure-only``, ``TRAINING`` by ``nlk train``. Overheads are in percent of the
variant ``none`` and null where it is not compared.
"""

from collections.abc import Mapping
from typing import Any

_HEAD = {
    "format": "version of this schema, now 2",
    "kind": "comparison, costs or training",
    "name": "name of the run folder",
    "command": "command line that produced the report",
    "created": "local time, ISO 8601",
    "seconds": "wall-clock duration of the command",
    "environment.device": "torch name of the device",
    "environment.device_name": "model of the processor or GPU",
    "environment.dtype": "dtype of parameters and clips",
    "environment.threads": "CPU threads of torch",
    "environment.torch": "version of torch",
    "environment.python": "version of Python",
    "environment.nlkernels": "version of this package",
    "environment.platform": "operating system and machine",
    "config": "resolved configuration, see training/config.py",
    "data.kind": "synthetic or folder",
    "data.classes": "names of the classes",
    "data.train_clips": "clips of one pass over the training data",
    "data.test_clips": "clips of one test",
    "data.protocol": "how test clips are taken; belongs to every accuracy",
    "data.problems[].path": "video that could not be used",
    "data.problems[].reason": "why",
    "training.steps": "length of every training",
    "training.batch": "clips per step",
    "training.frames": "frames of a training clip",
    "training.size": "height and width of a training clip in pixels",
    "training.attention[].block": "name of the block in the model",
    "training.attention[].n": "query positions at the training clip",
    "training.attention[].m": "key positions at the training clip",
    "training.attention[].backend": "backend of its forward in the variant fast",
}
COMPARISON = _HEAD | {
    "profile.batch": "clips per measured step",
    "profile.frames": "frames of a measured clip",
    "profile.size": "height and width of a measured clip in pixels",
    "profile.rounds": "measured steps of every variant",
    "profile.classes": "classes of the measured networks",
    "profile.memory_gib": "size of the memory whose largest batch is asked; null if unset",
    "profile.attention[].block": "name of the block in the model",
    "profile.attention[].n": "query positions at the measured clip",
    "profile.attention[].m": "key positions at the measured clip",
    "profile.attention[].backend": "backend of its forward in the variant fast",
    "agreement[].seed": "seed of a pair of naive and fast trainings",
    "agreement[].steps": "first steps that are compared",
    "agreement[].loss_difference": "largest |loss naive - loss fast| over them",
    "variants[].name": "none, naive, fast, local or frame",
    "variants[].description": "what the name means",
    "variants[].parameters": "trainable values",
    "variants[].multiply_adds": "published FLOPs of one measured clip: forward, a multiply-add "
    "is one, products with the affinity count whole",
    "variants[].flops": "executed FLOPs of one measured clip: forward, a multiply-add is two",
    "variants[].forward_ms.p20": "forward pass and loss of a measured batch, 20% quantile",
    "variants[].forward_ms.p50": "median",
    "variants[].forward_ms.p80": "80% quantile",
    "variants[].backward_ms.p20": "backward pass",
    "variants[].backward_ms.p50": "median",
    "variants[].backward_ms.p80": "80% quantile",
    "variants[].optimiser_ms.p20": "update of the parameters",
    "variants[].optimiser_ms.p50": "median",
    "variants[].optimiser_ms.p80": "80% quantile",
    "variants[].step_ms.p20": "sum of the three, step by step",
    "variants[].step_ms.p50": "median",
    "variants[].step_ms.p80": "80% quantile",
    "variants[].clips_per_s": "measured batch divided by the median step time",
    "variants[].memory_mib": "peak of live tensor bytes of a step above the level before it",
    "variants[].device_mib": "the same by the GPU allocator; null on CPU",
    "variants[].resident_mib": "growth of the peak resident set in a step; null where unreadable",
    "variants[].state_mib": "weights, buffers and optimiser state, held before the step",
    "variants[].largest_batch": "clips that fit the memory with the state; null if not asked, or "
    "if the peaks do not grow",
    "variants[].largest_batch_text": "the same with the batches whose peaks it is reckoned from",
    "variants[].over_none.step_ms": "medians, difference to none; null without it",
    "variants[].over_none.memory_mib": "difference to none; null without it",
    "variants[].overhead_percent.multiply_adds": "against none; null without it",
    "variants[].overhead_percent.parameters": "against none; null without it",
    "variants[].overhead_percent.flops": "against none; null without it",
    "variants[].overhead_percent.step_ms": "medians, against none; null without it",
    "variants[].overhead_percent.memory_mib": "against none; null without it",
    "variants[].accuracy": "test accuracy between 0 and 1, mean over the seeds",
    "variants[].runs[].seed": "seed of initial weights and data order",
    "variants[].runs[].accuracy": "test accuracy after this training",
    "variants[].runs[].test_loss": "test cross-entropy after this training",
    "variants[].runs[].train_loss": "training loss, mean of the last 20 steps",
    "variants[].runs[].train_s": "wall-clock duration of this training",
}
_OF_TRAININGS = ("data.", "training.", "agreement", "variants[].accuracy", "variants[].runs")
COSTS = {name: text for name, text in COMPARISON.items() if not name.startswith(_OF_TRAININGS)}
TRAINING = _HEAD | {
    "result.parameters": "trainable values",
    "result.accuracy": "test accuracy between 0 and 1",
    "result.test_loss": "test cross-entropy",
    "result.train_loss": "training loss, mean of the last 20 steps",
    "result.train_s": "wall-clock duration of the training",
    "result.mean_colour_accuracy": "accuracy from each clip's mean colour alone; null if not asked",
    "course.tests[].step": "steps before this test; of the whole training, earlier parts included",
    "course.tests[].accuracy": "test accuracy between 0 and 1",
    "course.tests[].loss": "test cross-entropy",
    "course.breaks[].step": "steps behind which the training was interrupted and resumed",
    "course.step_ms": "sum of the four times of a step, median over the steps",
    "course.data_ms": "waiting for clips and moving them, median",
    "course.forward_ms": "forward pass and loss, median",
    "course.backward_ms": "backward pass, median",
    "course.optimiser_ms": "update of the parameters, median",
    "course.share.data_ms": "share of the time of all steps, between 0 and 1",
    "course.share.forward_ms": "share of the forward passes",
    "course.share.backward_ms": "share of the backward passes",
    "course.share.optimiser_ms": "share of the updates",
    "course.clips_per_s": "clips of a step by its time, median",
    "course.peak_mib": "peak of the GPU allocator, on CPU of the resident set",
}


def check_schema(report: Mapping[str, Any], schema: Mapping[str, str]) -> None:
    """Raise ValueError unless a report has exactly the fields of a schema.

    Empty lists hide the fields of their items; the resolved configuration is not looked into.
    """
    found = _fields(report)
    empty = tuple(name for name in found if name.endswith("[]"))
    missing = {name for name in schema if name not in found and not name.startswith(empty or "\0")}
    unknown = found - set(schema) - set(empty)
    if missing or unknown:
        raise ValueError(
            f"report: expected the fields of the schema, got missing {sorted(missing)} and "
            f"unknown {sorted(unknown)}; keep the schema and the report in step"
        )


def _fields(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, Mapping) and prefix != "config":
        dot = f"{prefix}." if prefix else ""
        return set().union(*(_fields(inner, f"{dot}{name}") for name, inner in value.items()))
    if isinstance(value, list) and (not value or isinstance(value[0], Mapping)):
        return (
            {f"{prefix}[]"}
            if not value
            else set().union(*(_fields(v, f"{prefix}[]") for v in value))
        )
    return {prefix}
