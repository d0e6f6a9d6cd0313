"""What breaks a run of several processes, or its loaders: no hang, no rest, and a clean message."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from nlkernels.cli import main
from nlkernels.models import create_model
from nlkernels.training import checkpoint
from nlkernels.training.data.dataset import ClipDataset
from nlkernels.training.data.synthetic import write_synthetic
from tests.training.test_distributed import FILES, ROOT, free_port, left_over, torchrun


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=6, seed=0, frames=4, size=32)
    return root / "clips"


# A driver's name is on the command line of every process of its run.
DRIVER = """
import os, sys
import torch
from nlkernels.cli import main
from nlkernels.training import updates

step = updates.Updater.step

def broken(self, clips, labels, watch, *, where, numbers=None):
    if where == "step 3" and os.environ["RANK"] == "1":
        clips[0, 0, 0, 0, 0] = float("nan")
    before = [p.detach().clone() for p in self.model.parameters()]
    try:
        return step(self, clips, labels, watch, where=where, numbers=numbers)
    except updates.NonFiniteError:
        same = all(map(torch.equal, before, self.model.parameters()))
        print(f"process {os.environ['RANK']} unchanged: {same}", file=sys.stderr, flush=True)
        raise

if __name__ == "__main__":
    updates.Updater.step = broken
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.gate
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_in_one_process_stops_all(generated, tmp_path, precision):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=6", "optim.batch=8"]
    argv += [f"optim.precision={precision}", "optim.accumulate=2", "run.checkpoint_every=1"]
    result = torchrun(
        [*argv, f"run.out={tmp_path / 'out'}"],
        module=(str(driver),),
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    for rank in (0, 1):
        assert f"process {rank} unchanged: True" in result.stderr
    # The process itself names the clips, the other one says that it was not its own.
    assert "expected a finite loss, got nan at step 3 (clips " in result.stderr
    assert "expected a finite loss of every process, got nan at step 3; " in result.stderr
    assert checkpoint.load(tmp_path / "out" / "model.pt")["step"] == 2
    lines = (tmp_path / "out" / "model.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "stopped"
    assert not left_over(driver)


@pytest.mark.gate
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_torchrun_saves_and_leaves_nobody(generated, tmp_path, workers):
    driver = tmp_path / "driver.py"
    driver.write_text("import sys\nfrom nlkernels.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=100000"]
    argv += [f"data.workers={workers}", f"run.out={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *(f"--master-port={free_port()}", str(driver), "train", *argv),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "out" / "model.jsonl"
    deadline = time.monotonic() + 90
    while not (log.is_file() and log.read_text().count('"event": "step"') > 5):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in 90 seconds"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert out.count("stopped and saved at step") == 1
    # torchrun's own: it ends with the exception that its handler of the signal raises.
    assert process.returncode == 1, err
    assert "SignalException: Process" in err and "got signal: 15" in err
    events = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [event["step"] for event in events if event["event"] == "step"]
    content = checkpoint.load(tmp_path / "out" / "model.pt")
    assert content["step"] == steps[-1] > 5
    assert len(content["rng"]) == 2
    assert not left_over(driver)


def test_a_loader_process_that_ends_is_one_line(generated, tmp_path, monkeypatch, capsys):
    decoded = ClipDataset.decoded

    def ending(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os._exit(3)
        return decoded(self, index)

    monkeypatch.setattr(ClipDataset, "decoded", ending)
    argv = ["train", "smoke", f"data.root={generated}", *FILES, "data.workers=1"]
    # DataLoader may not know the process yet when it ends, and then finds it by its time-out.
    assert main([*argv, "data.timeout_s=15", f"run.out={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("nlk train: data: expected loader processes that live, got: DataLoader")
    assert "set data.decode=child" in err
    assert err.count("\n") == 1
    last = json.loads((tmp_path / "model.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "stopped"
    # The next run is not disturbed.
    monkeypatch.undo()
    assert main([*argv, f"run.out={tmp_path}"]) == 0


OPTIONS = {"num_classes": 4, "width": 0.5, "blocks": 2, "block": {"zero_init": None}}
GRADIENTS = """
import sys
import torch
from nlkernels.training.distributed import joined, parallel
from tests.training.test_failures import gradients, network

if __name__ == "__main__":
    with joined("cpu") as processes:
        model = network(checkpointing=True)
        found = gradients(parallel(model, torch.device("cpu"), processes), processes)
        if processes.first:
            torch.save(found, sys.argv[1])
"""


def network(*, checkpointing):
    torch.manual_seed(0)
    model = create_model("c2d_tiny", checkpointing=checkpointing, **OPTIONS).train()
    for module in model.modules():
        # Each process's own statistics would be those of other clips.
        if isinstance(module, nn.BatchNorm3d):
            module.eval()
    return model


def gradients(model, processes=None):
    """Gradients of a batch, each process with its part of it."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(8, 3, 4, 32, 32, generator=generator)
    labels = torch.randint(4, (8,), generator=generator)
    if processes is not None:
        clips = clips.chunk(processes.count)[processes.rank]
        labels = labels.chunk(processes.count)[processes.rank]
    nn.functional.cross_entropy(model(clips), labels).backward()
    inner = getattr(model, "module", model)
    return {name: p.grad.clone() for name, p in inner.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    largest = max(one.abs().max().item() for one in expected.values())
    for name, one in expected.items():
        assert (found[name] - one).abs().max().item() <= 1e-6 * largest, name


def test_recomputed_activations_give_the_same_gradients():
    expected = gradients(network(checkpointing=False))
    assert_equal(gradients(network(checkpointing=True)), expected)
    assert all(one.abs().max() > 0 for one in expected.values())


@pytest.mark.gate
def test_two_processes_that_recompute_have_the_gradients_of_one(tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(GRADIENTS)
    result = torchrun(
        [], program=(str(driver), str(tmp_path / "found.pt")), environment={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_equal(found, gradients(network(checkpointing=False)))
