"""Whether our block with another library's weights is that library's block."""

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nlkernels.modules.base import NonLocalBlock
from tests.golden_systems import exported_gradients

# Largest difference from the other library's float64 result: of the output and the state relative
# to their own magnitude, of gradients relative to the largest of all. In float32 three times the
# other library's own difference comes on top, the largest for the input and for some that differ
# from it in last bits: normalisation by small variances multiplies every rounding, so that one
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
    medians: bool = False,
) -> None:
    """Outputs, gradients, running statistics and state dicts agree in float64, `single` in float32.

    `medians` compares medians over inputs that differ in last bits.
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
        assert found.keys() == truth.keys()
        return {key: error(truth[key], found[key]) / scales[key] for key in truth}

    def of_several(statistic: Callable, inputs: list[torch.Tensor], *how: Any) -> dict[str, float]:
        found = [errors(results(*how, each)) for each in inputs]
        return {key: statistic(each[key] for each in found) for key in truth}

    truth = results(theirs, torch.float64, nn.Module.state_dict)
    scales = {key: tensor.abs().max().item() or 1.0 for key, tensor in truth.items()}
    gradients = [key for key in truth if key.startswith("grad:")]
    scales |= dict.fromkeys(gradients, max((scales[key] for key in gradients), default=1.0))
    for dtype in OUTPUT if single else [torch.float64]:
        nudged = [torch.nextafter(x, x + torch.randn(shape)) for _ in range(4 if medians else 2)]
        inputs = [x, *nudged] if dtype == torch.float32 else [x]
        statistic = statistics.median if medians else max
        same_dtype = of_several(statistic, inputs, theirs, dtype, nn.Module.state_dict)
        export = functools.partial(type(ours).to_foreign, preset=preset, **options)
        found = of_several(statistic, inputs if medians else [x], ours, dtype, export)
        bounds = dict.fromkeys(truth, OTHERS[dtype] + 3 * max(same_dtype.values()))
        bounds["out"] = OUTPUT[dtype] + 3 * same_dtype["out"]
        bad = {key: value for key, value in found.items() if not value <= bounds[key]}
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
