"""What is tested instead of the last step's state: averaged weights, precise running statistics."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config_optim import OptimConfig
from .distributed import ALONE, Processes
from .freezing import train_mode


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that ``update_parameters(model)`` draws towards it, buffers included.

    Args:
        model: Its weights are where the copy starts; the first update replaces them.
        decay: Share of the copy's own values that an update keeps.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def set_precise_norms(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    optim: OptimConfig,
    *,
    device: torch.device,
    processes: Processes = ALONE,
) -> None:
    """Replace the running statistics of batch norms by means over batches.

    The mean is that of the batches' means. The variance is E[variance + mean^2] less its square:
    that of all values, but for the factor n / (n - 1) of torch's running variances. The original
    does this with 200 batches before tests and checkpoints, PySlowFast at the end of an epoch.
    Norms that use their running statistics stay as they are, and where the batches end in an
    exception all do; no random number of the caller's is drawn.

    Args:
        model: On ``device``. It is left in training mode.
        batches: Clips (B, C, T, H, W), labels and numbers, of this process.
        optim: ``norms``.
        device: Where the model is.
        processes: Statistics are means over their batches.
    """
    train_mode(model, optim)
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    counted = [norm.num_batches_tracked.clone() for norm in norms]
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    sums = [torch.zeros(2, norm.num_features, dtype=torch.float64) for norm in norms]
    number = 0
    try:
        for norm in norms:
            # The running statistics are then those of the last batch.
            norm.momentum = 1.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for clips, _, _ in batches:
                model(clips.to(device))
                number += 1
                for norm, both in zip(norms, sums, strict=True):
                    mean, variance = norm.running_mean.double(), norm.running_var.double()
                    both += torch.stack((mean, variance + mean.square())).cpu()
    except BaseException:
        # Such as a signal, behind which the network is saved.
        for norm, (mean, variance) in zip(norms, before, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        raise
    finally:
        for norm, momentum, count in zip(norms, momenta, counted, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
    for norm, both in zip(norms, sums, strict=True):
        values = processes.means(number, *both.flatten().tolist())
        mean, square = torch.tensor(values[1:], dtype=torch.float64).view_as(both) / values[0]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean.square())
