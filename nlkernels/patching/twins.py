"""Copies of a block beside the model: to run it without hooks, buffers or numbers of the model's.

`difference` runs a block of another system, and the same block as it is computed here, in float64
with random weights on a small random clip. Zeros that make a new block the identity would hide all
that comes before them.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nlkernels.patching.classes import Replaced, exchange
from nlkernels.patching.view import View

# Positions of the random clip, which no usual pool divides, by the number of dimensions.
_POSITIONS = {1: (11,), 2: (5, 7), 3: (2, 5, 5)}
# Of float64 numbers whose largest is 1.
_TOLERANCE = 1e-9
_GRADIENT = "gradient of "
# Hooks that compute a weight of the module which calls them.
_COMPUTE = (WeightNorm, SpectralNorm, BasePruningMethod)
# Where a module keeps its hooks.
HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)


def twin(module: nn.Module, dtype: torch.dtype | None = None, device: object = None) -> nn.Module:
    """A module of the same classes and values; its tensors are copies.

    Hooks and forwards of the instance are left out, as they may refer to the module itself, but for
    torch's that compute a weight.

    Args:
        module: it.
        dtype: of the floating-point copies; None is that of each.
        device: of the copies; None is that of each, meta tensors have zeros on "cpu".
    """

    def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        wanted = dtype if tensor.is_floating_point() else None
        if tensor.is_meta and device is not None:
            return torch.zeros(tensor.shape, dtype=wanted or tensor.dtype, device=device)
        return tensor.detach().to(device=device, dtype=wanted, copy=True)

    made = type(module).__new__(type(module))
    for name, held in module.__dict__.items():
        made.__dict__[name] = copied(held) if isinstance(held, torch.Tensor) else held
    made.__dict__.pop("forward", None)
    made.__dict__.update({name: OrderedDict() for name in HOOKS})
    made._forward_pre_hooks.update(
        (key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _COMPUTE)
    )
    made.__dict__["_parameters"] = {
        name: None if each is None else nn.Parameter(copied(each), each.requires_grad)
        for name, each in module._parameters.items()
    }
    made.__dict__["_buffers"] = {name: copied(each) for name, each in module._buffers.items()}
    made.__dict__["_modules"] = {
        name: None if child is None else twin(child, dtype, device)
        for name, child in module._modules.items()
    }
    made.__dict__["_compiled_call_impl"] = None
    return made


def difference(module: nn.Module, view: type[View]) -> str:
    """What tells a block from the same block computed here; "" if nothing does."""
    plain = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), plain:
        torch.manual_seed(0)
        for training in (True, False):
            if training and _needs_processes(module):
                continue
            made = _randomised(twin(module, torch.float64, "cpu"), view(module).constants)
            if found := _compare(made.train(training), view):
                return f"{found} in {'training' if training else 'evaluation'} mode"
    return ""


def _needs_processes(module: nn.Module) -> bool:
    return any("SyncBatchNorm" in type(part).__name__ for part in module.modules())


@torch.no_grad()
def _randomised(made: nn.Module, constants: tuple[str, ...]) -> nn.Module:
    for name, parameter in made.named_parameters():
        if name not in constants:
            fan = max(parameter[0].numel() if parameter.dim() > 1 else 4, 1)
            parameter.normal_(std=fan**-0.5)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return made


def _compare(made: nn.Module, view: type[View]) -> str:
    seen = view(made)
    smallest = seen.pool_size or (1,) * seen.dims
    sizes = [
        max(n, 2 * p + 1) if p > 1 else n
        for n, p in zip(_POSITIONS[seen.dims], smallest, strict=True)
    ]
    x = torch.randn(2, seen.dim, *sizes, dtype=torch.float64, device="cpu")
    ours = twin(made)
    exchange(ours, Replaced)
    ours.backend = "chunked"  # nothing is compiled for it
    expected, found = _results(made, x), _results(ours, x)
    for name, truth in expected.items():
        largest = truth.abs().max().item() or 1.0
        if name.startswith(_GRADIENT):
            gradients = (t for other, t in expected.items() if other.startswith(_GRADIENT))
            largest = max(largest, *(t.abs().max().item() for t in gradients))
        got = found.get(name)
        # Not error > limit: neither holds for a NaN.
        if got is None or not (got - truth).abs().max().item() <= _TOLERANCE * largest:
            error = "none" if got is None else f"{(got - truth).abs().max().item() / largest:.1e}"
            return f"its {name} differs by {error} of the largest number"
    return ""


def _results(made: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients where there are, and buffers after; random layers draw the same always."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    wanted = {name: p for name, p in made.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        out = made(x)
        found = {"output": out.detach()}
        grads = gradients(out, [x, *wanted.values()])
    names = [f"{_GRADIENT}x", *(f"{_GRADIENT}{name}" for name in wanted)]
    if grads:
        found |= {n: g for n, g in zip(names, grads, strict=True) if g is not None}
    return found | {f"buffer {name}": b.double() for name, b in made.named_buffers()}


def gradients(out: torch.Tensor, wanted: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Gradients of a block's output, None for what it does not depend on.

    Empty where the block changes in place what its backward needs, as mmcv's concatenation does.
    """
    # A cotangent that no symmetry of a norm cancels; in every dtype the same but for rounding.
    places = torch.linspace(-1, 2, out.numel(), dtype=torch.float32, device=out.device)
    cotangent = places.view_as(out).cos().to(out.dtype)
    try:
        return torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return ()
