"""What our networks compute in the place of the golden cases' public ones: results and stages."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn

from tests.golden_cases import GoldenCase
from tests.golden_systems import given

_RESULTS = ("logits", "location_logits", "probabilities")
# What happens to logits at each location before they are averaged.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "none": lambda logits: logits,
}


def outputs(model: nn.Module, case: GoldenCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every output that a case has a digest of, from runs in `dtype`."""
    digests = case.record["outputs"]
    model.to(dtype)
    seen: dict[str, torch.Tensor] = {}
    handles = [_tap(model, name, seen) for name in digests if name not in (*_RESULTS, "pool5")]
    handles.append(model.fc.register_forward_pre_hook(_keep_input(seen, "pool5")))
    handles.append(model.fc.register_forward_hook(_keep(seen, "location_logits")))
    clip = _clip(case, model.design.in_channels).to(dtype)
    located = _at_locations(model, digests)
    with torch.no_grad():
        if "logits" in digests or not located:
            seen["logits"] = model(clip)
            seen["probabilities"] = seen["logits"].softmax(-1)
        if located:
            logits = model.location_logits(clip)
            seen["probabilities"] = _activation(case)(logits).mean(dim=(1, 2, 3))
    for handle in handles:
        handle.remove()
    return {name: _shaped(seen, name, digests[name]["shape"]) for name in digests}


def _at_locations(model: nn.Module, digests: Mapping[str, object]) -> bool:
    """Whether results come from every location of the last map."""
    if {"location_logits", "pool5"} & digests.keys():
        return True
    return "probabilities" in digests and model.design.system in ("caffe2", "slowfast")


def _activation(case: GoldenCase) -> Callable[[torch.Tensor], torch.Tensor]:
    name = given(case.record["config"], "head_act", "softmax")
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"golden case: expected head_act to be one of {', '.join(_ACTIVATIONS)}, got {name!r}; "
            "the public code has these"
        )
    return _ACTIVATIONS[name]


def _tap(model: nn.Module, name: str, seen: dict[str, torch.Tensor]):
    """Keep the activation of a name: the output of a layer, or of it before its block."""
    layer, before_block = _place(model, name)
    module = model.get_submodule(layer)
    block = getattr(module, "nl", None)
    if before_block and block is not None:
        return block.register_forward_pre_hook(_keep_input(seen, name))
    return module.register_forward_hook(_keep(seen, name))


def _keep(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    return lambda _module, _inputs, output: seen.update({name: output})


def _keep_input(seen: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    return lambda _module, inputs: seen.update({name: inputs[0]})


# (public name, our layer, whether the name means it without the block behind it).
_NAMES = (
    (r"res(\d)", lambda s: f"layer{int(s) - 1}", False),
    (r"layer(\d)", "layer{}".format, False),
    (r"nonlocal_conv(\d)_(\d+)", lambda s, index: f"layer{int(s) - 1}.{index}", False),
    (r"(pool\d)", "{}".format, False),
    (r"mixed_(\d\w)", "mixed{}".format, True),
    (r"conv3d_([12]\w)_.*", "conv{}".format, False),
    (r"maxpool3d_2a_.*", "pool_conv2b".format, False),
    (r"maxpool3d_([345])a_.*", "pool_mixed{}b".format, False),
    (r"nl_3", "mixed3c".format, False),
    (r"nl_4", "mixed4d".format, False),
)


def _place(model: nn.Module, name: str) -> tuple[str, bool]:
    """Our layer of a public name, and whether the name means it without the block behind it."""
    if name == "conv1":  # mmcv's convolutions end behind norm and ReLU
        return ("relu" if model.design.system == "mmaction" else "conv1"), False
    layers = dict(model.named_modules())
    for pattern, ours, before_block in _NAMES:
        match = re.fullmatch(pattern, name.lower())
        if match is not None and ours(*match.groups()) in layers:
            return ours(*match.groups()), before_block
    raise ValueError(
        f"golden case: expected an activation that {model.name} has, got {name!r}; known are "
        "conv1, pool1, pool2, pool5, res2 to res5, nonlocal_conv3_1 and the like, and those of "
        "Inception"
    )


def _shaped(seen: Mapping[str, torch.Tensor], name: str, shape: list[int]) -> torch.Tensor:
    """A tensor in the form of the public code's."""
    found = seen[name]
    if name == "pool5" and found.dim() == 5:
        return found.movedim(-1, 1)
    if name == "logits" and len(shape) == 3:  # (B, classes, T')
        return seen["location_logits"][:, :, 0, 0].transpose(1, 2)
    if name == "logits" and len(shape) == 1:  # one clip without its batch
        return found.squeeze(0)
    if found.dim() == 5 and len(shape) == 4:  # (B T, C, H, W)
        return found.transpose(1, 2).flatten(0, 1)
    return found


def _clip(case: GoldenCase, channels: int) -> torch.Tensor:
    """The input as (B, C, T, H, W)."""
    clip = torch.from_numpy(case.inputs["clip"])
    if clip.dim() == 5:
        return clip
    # (B, T C, H, W) or (B T, C, H, W): the same numbers in the same order. How many of them are one
    # clip is told, or shows in the results.
    size = clip.shape[2:]
    results = [case.record["outputs"][name] for name in _RESULTS if name in case.record["outputs"]]
    segments = case.record["config"].get("num_segments")
    batch = -1 if segments else results[0]["shape"][0]
    return clip.reshape(batch, segments or -1, channels, *size).transpose(1, 2)
