"""Several processes that train one network: torchrun on this machine, connected by gloo."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nlkernels.cli import main
from nlkernels.training import checkpoint, distributed
from nlkernels.training.config import Config, DataConfig, OptimConfig
from nlkernels.training.data.synthetic import write_synthetic
from nlkernels.training.distributed import ALONE, Processes, choose_device
from nlkernels.training.loading import StepSampler
from nlkernels.training.sharding import ShardedSampler, check_batch
from nlkernels.training.sharding import test_order as order_of_the_test

ROOT = Path(__file__).parents[2]
FILES = ["data.train_files=12", "data.test_files=6", "optim.lr=0.02", "run.device=cpu"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    root = tmp_path_factory.mktemp("generated")
    write_synthetic(root / "clips", train=12, test=6, seed=0, frames=4, size=32)
    return root / "clips"


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def torchrun(
    argv, *, count=2, restarts=0, module=("-m", "nlkernels.cli"), program=None, environment=None
):
    """Run ``nlk train``, or another program, in several processes; the result of torchrun."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"),
            *(f"--master-port={free_port()}", f"--max-restarts={restarts}"),
            *((*module, "train", *argv) if program is None else program),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # It ends its processes, which a kill would leave behind.
        process.terminate()
        process.communicate(timeout=60)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def difference(one, other):
    """Largest difference of two checkpoints' parameters, in units of the largest parameter."""
    pairs = [
        (value, other["model"][name])
        for name, value in one["model"].items()
        if "running" not in name and "num_batches" not in name
    ]
    return max(((a - b).abs().max() / a.abs().max().clamp_min(1e-3)).item() for a, b in pairs)


def steps_of(out):
    lines = [json.loads(line) for line in (out / "model.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


SETTINGS = {
    # With running statistics no layer looks at other clips: as one process does.
    "frozen": (["optim.norms=frozen", "optim.accumulate=2"], ["optim.accumulate=1"]),
    # Statistics of each process's part, as those of the parts of one process.
    "batch": (["optim.norms=batch"], ["optim.accumulate=2"]),
}


# Each starts four processes.
LONG = [pytest.param(*SETTINGS["batch"], id="batch", marks=pytest.mark.gate)]


@pytest.mark.parametrize(
    ("both", "reference"), [pytest.param(*SETTINGS["frozen"], id="frozen"), *LONG]
)
def test_two_processes_are_as_one(generated, tmp_path, both, reference):
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=4", "optim.batch=8", *both]
    result = torchrun([*argv, f"run.out={tmp_path / 'two'}", "run.checkpoint_every=2"])
    assert result.returncode == 0, result.stderr
    assert main(["train", *argv, *reference, f"run.out={tmp_path / 'one'}"]) == 0
    two, one = (checkpoint.load(tmp_path / name / "model.pt") for name in ("two", "one"))
    assert difference(one, two) < 1e-6
    # One process writes and prints.
    assert result.stdout.count("report: ") == 1
    assert result.stdout.count("test accuracy") == 1
    for mine, theirs in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"])
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    if both[0] == "optim.norms=frozen":
        reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two")]
        one, two = (report["result"] for report in reports)
        assert one["accuracy"] == two["accuracy"]
        assert one["test_loss"] == pytest.approx(two["test_loss"], rel=1e-5)
    # Each has drawn from its own seed, and goes on from its own state.
    states = checkpoint.load(tmp_path / "two" / "model.pt")["rng"]
    assert len(states) == 2
    assert not torch.equal(states[0]["cpu"], states[1]["cpu"])


DRIVER = """
import os, signal, sys
from nlkernels.cli import main
from nlkernels.training import session

behind = session.Session._behind

def hit(self, record, stop):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and record.step == 5:
        if os.environ["RANK"] == "1":
            {event}
    behind(self, record, stop)

if __name__ == "__main__":
    session.Session._behind = hit
    sys.exit(main(sys.argv[1:]))
"""


IN_A_TEST = """
import os, signal, sys
from nlkernels.cli import main
from nlkernels.training import session

usual = session.{place}

def hit(*args, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return usual(*args, **options)

if __name__ == "__main__":
    session.{place} = hit
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.gate
def test_a_signal_to_one_process_stops_all_behind_the_same_step(generated, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(event="os.kill(os.getpid(), signal.SIGTERM)"))
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=1000", f"run.out={tmp_path}"]
    environment = {"PYTHONPATH": str(ROOT)}
    result = torchrun(argv, module=(str(driver),), environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped and saved at step 6 of 1000") == 1
    assert len(checkpoint.load(tmp_path / "model.pt")["rng"]) == 2
    assert not left_over(driver)


@pytest.mark.gate
@pytest.mark.parametrize("more", [[], ["optim.precise_norms=2"]], ids=["test", "precise-norms"])
def test_a_signal_to_one_process_in_a_test_stops_all(generated, tmp_path, more):
    driver = tmp_path / "driver.py"
    place = "set_precise_norms" if more else "evaluate"
    driver.write_text(IN_A_TEST.format(place=place))
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=6", "run.test_every=2", *more]
    environment = {"PYTHONPATH": str(ROOT)}
    result = torchrun(
        [*argv, f"run.out={tmp_path}"], module=(str(driver),), environment=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped and saved at step 2 of 6") == 1
    assert len(checkpoint.load(tmp_path / "model.pt")["rng"]) == 2


@pytest.mark.gate
def test_a_lost_process_is_restarted_and_resumes_by_itself(generated, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(event="os._exit(9)"))
    argv = ["smoke", f"data.root={generated}", *FILES, "optim.steps=8", "optim.norms=frozen"]
    argv += ["run.checkpoint_every=2", "run.log_every=1"]
    result = torchrun(
        [*argv, f"run.out={tmp_path / 'two'}"],
        restarts=1,
        module=(str(driver),),
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    # From step 4, whose checkpoint was the last.
    assert result.stdout.count("step 4/8") == 1
    assert result.stdout.count("step 6/8") == 1
    assert [step["step"] for step in steps_of(tmp_path / "two")] == list(range(1, 9))
    assert main(["train", *argv, f"run.out={tmp_path / 'one'}"]) == 0
    two, one = (checkpoint.load(tmp_path / name / "model.pt") for name in ("two", "one"))
    assert difference(one, two) < 1e-6
    assert not left_over(driver)


def left_over(name):
    """Processes whose command line has this name."""
    time.sleep(0.5)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(name) in (folder / "cmdline").read_text():
                found.append(folder.name)
        except OSError:
            continue
    return found


class Clips:
    """Seven videos of two clips."""

    def __len__(self):
        return 14

    def video_of(self, number):
        return number // 2


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_a_test_takes_every_video_once_and_whole(count):
    config = Config(optim=OptimConfig(steps=1, batch=6, accumulate=1))
    orders = [order_of_the_test(Clips(), config, Processes(rank, count)) for rank in range(count)]
    numbers = [[number for batch in order for _, number in batch] for order in orders]
    assert sorted(itertools.chain(*numbers)) == list(range(14))
    for own in numbers:
        assert own == sorted(own)
        assert all(own.count(n + 1) == 1 for n in own if n % 2 == 0)
    assert max(len(batch) for order in orders for batch in order) <= max(1, 6 // count)


def test_whole_frames_of_one_video_at_a_time():
    config = Config(
        data=DataConfig(test_crops="full"), optim=OptimConfig(steps=1, batch=6, accumulate=1)
    )
    order = order_of_the_test(Clips(), config, ALONE)
    assert [[n for _, n in batch] for batch in order] == [[2 * v, 2 * v + 1] for v in range(7)]


def test_parts_of_a_batch_are_the_batch():
    whole = list(StepSampler(10, batch=6, steps=5, start=2, seed=3))
    parts = [
        list(ShardedSampler(StepSampler(10, batch=6, steps=5, start=2, seed=3), Processes(r, 3)))
        for r in range(3)
    ]
    assert len(parts[0]) == len(whole) == 3
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_a_batch_that_cannot_be_shared():
    check_batch(24, 3, Processes(0, 4))
    with pytest.raises(
        ValueError, match=r"multiple of 12 .*got 32; set for example optim.batch=36"
    ):
        check_batch(32, 3, Processes(0, 4))


def test_seeds_of_processes_differ():
    assert Processes(0, 4).seed(7) == 7
    assert len({Processes(rank, 64).seed(7) for rank in range(64)}) == 64


def test_processes_wait_while_the_first_decodes_a_whole_folder(monkeypatch):
    # torch's own half an hour is less than a large one takes.
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    store, taken = torch.distributed.HashStore(), {}
    monkeypatch.setattr(distributed, "rendezvous", lambda *_: iter([(store, 0, 2)]))
    monkeypatch.setattr(
        distributed.distributed, "init_process_group", lambda *_, **options: taken.update(options)
    )
    monkeypatch.setattr(distributed.distributed, "destroy_process_group", lambda: None)
    with distributed.joined("cpu") as processes:
        assert processes == Processes(0, 2)
    assert taken["timeout"] >= timedelta(days=1)


def test_a_comparison_is_for_one_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["compare", "smoke", f"run.out={tmp_path / 'out'}"]) == 2
    assert "expected one process, got 4 from torchrun" in capsys.readouterr().err


def test_more_processes_than_gpus():
    count = torch.cuda.device_count()
    beyond = Processes(count + 1, count + 2, local_rank=count + 1)
    with pytest.raises(ValueError, match=r"among cpu and \d+ CUDA devices, got 'cuda' in process"):
        choose_device("cuda", beyond)
    with pytest.raises(ValueError, match=r"expected run.device auto or cuda for 2 processes"):
        choose_device("cuda:0", Processes(0, 2))
    assert choose_device("cpu", Processes(1, 2, local_rank=1)) == torch.device("cpu")


def test_statistics_stay_each_process_s_own_without_a_warning(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = distributed.parallel(
                torch.nn.BatchNorm1d(3), torch.device("cpu"), Processes(count=2)
            )
        assert not network.broadcast_buffers
        network(torch.randn(4, 3))
    finally:
        torch.distributed.destroy_process_group()
