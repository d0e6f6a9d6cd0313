"""Several processes that train one network: ``torchrun --nproc-per-node N -m nlkernels.cli train``.

Every process holds the whole network and a part of each batch; gradients are averaged. The first
process alone writes and prints. What a process draws at random depends on its rank; what the run
computes does not depend on their number where no layer looks at other clips.
"""

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# The first process may decode every video of a folder while the others wait, and torch gives up
# after half an hour. A lost process ends the others by torchrun, and no video hangs for ever.
_PATIENCE = timedelta(days=2)
# Apart from each other in the seeds that people choose; the first process keeps the run's own.
_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int = 0
    """Number of this one, from 0."""
    count: int = 1
    """How many they are."""
    local_rank: int = 0
    """Number of this one among those of its machine."""
    restarts: int = 0
    """How often torchrun has started them again."""

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """Seed of this process's dropout."""
        return (seed + _SEED_STEP * self.rank) % 2**63

    def means(self, *values: float) -> list[float]:
        """Mean of every value over the processes; all of them call it."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(sums)
        return (sums / self.count).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank, in all of them."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def share(self, model: nn.Module) -> None:
        """Give all processes the buffers of the first one, running statistics above all."""
        if self.count > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process runs this before the others do, which find its files."""
        if not self.first:
            self.means(0.0)
        yield
        if self.first:
            self.means(0.0)


ALONE = Processes()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; a process on its own is alone.

    All but the first one print nothing from here on.

    Args:
        device: ``run.device``; with ``cpu`` or without GPUs gloo connects them, else NCCL.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if count == 1:
        yield Processes(restarts=restarts)
        return
    # Objects and single numbers go through gloo on every device.
    gpus = device != "cpu" and torch.cuda.is_available()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if gpus and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    # Processes that are started again may find the addresses of the dead ones in torchrun's store.
    store, _, _ = next(rendezvous("env://", rank, count))
    store = distributed.PrefixStore(f"start-{restarts}", store)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(
        backend, timeout=_PATIENCE, store=store, rank=rank, world_size=count
    )
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    try:
        yield Processes(rank, count, local_rank, restarts)
    except SystemExit:
        distributed.destroy_process_group()
        raise
    # Not after an error: the others may be waiting for this process, and torchrun ends them when it
    # ends.
    distributed.destroy_process_group()


def require_one_process() -> None:
    """Raise ValueError where torchrun started several processes that have not been joined."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and not distributed.is_initialized():
        raise ValueError(
            f"run: expected one process, got {count} from torchrun; only nlk train and nlk test "
            "share their work among several"
        )


def choose_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The device of this process.

    Args:
        name: ``run.device``: auto, cpu, cuda (the process's own GPU) or cuda:N.
        processes: Those that train together.

    Raises:
        ValueError: Unknown or absent device, fewer GPUs than processes on this machine, or one GPU
            for several processes.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"run: expected run.device to be auto, cpu or cuda:N, got {name!r}; use auto"
        ) from error
    if device.type == "cuda" and processes.count > 1 and device.index is not None:
        raise ValueError(
            f"run: expected run.device auto or cuda for {processes.count} processes, got {name!r}; "
            "each takes a GPU of its own"
        )
    index = processes.local_rank if device.index is None else device.index
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and index >= count):
        wanted = (
            f"{name!r}" if processes.count == 1 else f"{name!r} in process {index} of a machine"
        )
        raise ValueError(
            f"run: expected run.device among cpu and {count} CUDA devices, got {wanted}; use auto"
        )
    return torch.device("cuda", index) if device.type == "cuda" else device


def parallel(model: nn.Module, device: torch.device, processes: Processes) -> nn.Module:
    """The network as all processes train it together; the network itself if there is one only.

    Running statistics stay each process's own; those of the first one are tested and saved.

    Args:
        model: On ``device``; what is frozen is frozen already.
        device: Of this process.
        processes: Those that train together.
    """
    if processes.count == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    # Known from torch 2.13 on; the older name means the same, as all processes start equal.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=devices, **{name: False})
