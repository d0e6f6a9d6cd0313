"""Whether our block with another library's weights is that library's block."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nlkernels.modules.base import NonLocalBlock
from tests.golden_systems import exported_gradients

# Largest difference from the other library's float64 result: of the output and the state relative
# to their own magnitude, of gradients relative to the largest of all. In float32 three times the
# other library's own difference comes on top, the largest for the input and for the two that differ
# from it in the last bit: normalisation by small variances multiplies every rounding, so that one
# result of either block may be luckily near the truth, or gradients 5e-6 from it.
OUTPUT = {torch.float64: 1e-9, torch.float32: 1e-6}
OTHERS = {torch.float64: 1e-9, torch.float32: 1e-5}


def randomise(module: nn.Module) -> nn.Module:
    """Weights of which every one matters; running variances stay positive."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.6)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.4)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return module


def assert_same_block(
    theirs: nn.Module,
    cls: type[NonLocalBlock],
    preset: str,
    options: dict[str, Any],
    shape: tuple[int, ...],
    *,
    training: bool = True,
    backward: bool = True,
    single: bool = True,
) -> None:
    """Outputs, gradients, running statistics and state dicts agree in float64, `single` in float32.

    Normalisation of a single map by its own, small deviation multiplies float32's rounding by
    thousands: agreement of such blocks is a matter of luck, theirs with itself included.
    """
    theirs = copy.deepcopy(theirs).train(training)
    ours = cls.from_foreign(theirs.state_dict(), preset, **options).train(training)
    assert_same_state(ours.to_foreign(preset, **options), theirs.state_dict())
    x, cotangent = torch.randn(shape), torch.randn(shape)
    parameters = [name for name, _ in theirs.named_parameters()]

    def results(
        module: nn.Module, dtype: torch.dtype, export: Callable, x: torch.Tensor = x
    ) -> dict[str, torch.Tensor]:
        module = copy.deepcopy(module).to(dtype)
        found = run(module, x.to(dtype), cotangent.to(dtype), backward)
        if backward:
            gradients = exported_gradients(module, export)
            found |= {f"grad:{name}": gradients[name] for name in parameters}
        return found | {f"after:{key}": tensor for key, tensor in export(module).items()}

    def errors(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {key: error(truth[key], found[key]) / scales[key] for key in truth}

    def own_errors(dtype: torch.dtype) -> dict[str, float]:
        nudges = (0,) if dtype == torch.float64 else (-1, 0, 1)
        inputs = [torch.nextafter(x, x + nudge) for nudge in nudges]
        found = [errors(results(theirs, dtype, nn.Module.state_dict, each)) for each in inputs]
        return {key: max(each[key] for each in found) for key in truth}

    truth = results(theirs, torch.float64, nn.Module.state_dict)
    scales = {key: tensor.abs().max().item() or 1.0 for key, tensor in truth.items()}
    gradients = [key for key in truth if key.startswith("grad:")]
    scales |= dict.fromkeys(gradients, max((scales[key] for key in gradients), default=1.0))
    for dtype in OUTPUT if single else [torch.float64]:
        same_dtype = own_errors(dtype)
        found = results(ours, dtype, lambda module: module.to_foreign(preset, **options))
        assert found.keys() == truth.keys()
        bounds = dict.fromkeys(truth, OTHERS[dtype] + 3 * max(same_dtype.values()))
        bounds["out"] = OUTPUT[dtype] + 3 * same_dtype["out"]
        bad = {key: value for key, value in errors(found).items() if not value <= bounds[key]}
        assert not bad, f"{dtype}: {bad}, of {[bounds[key] for key in bad]}"


def error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference of two tensors of one shape."""
    assert expected.shape == found.shape
    return (expected.double() - found.double()).abs().max().item()


def run(
    module: nn.Module, x: torch.Tensor, cotangent: torch.Tensor, backward: bool
) -> dict[str, torch.Tensor]:
    """Output and, on demand, the gradient of the input; the parameters keep theirs."""
    if not backward:
        with torch.no_grad():
            return {"out": module(x)}
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(cotangent)
    return {"out": out.detach(), "grad:x": x.grad}


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)
