"""Whatever a kernel does to its process, the rows before it stay and the work behind it goes on."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import stage

CHILD = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.stage import Watch, lost_items
folder = Path(sys.argv[1])
rows, watch = folder / "rows.jsonl", Watch(folder)
done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
for item in ("one", "hang", "two", "crash", "three", "broken", "four"):
    if item in done or item in lost_items(folder):
        continue
    watch.begin(item, 0.4)
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        os.abort()
    if item == "broken":
        os._exit(75)
    with rows.open("a") as file:
        file.write(json.dumps(item) + chr(10))
sys.exit({code})
"""


def child(tmp_path: Path, code: int = 0) -> list[str]:
    # Without torch: the child imports only what the supervisor needs of it.
    text = CHILD.format(root=str(stage.results.ROOT), code=code)
    text = text.replace(
        "from benchmarks.stage import Watch, lost_items",
        "class Watch:\n"
        "    def __init__(self, folder): self.path = folder / 'under_way.json'\n"
        "    def begin(self, item, limit):\n"
        "        self.path.write_text(json.dumps({'item': item, 'until': time.time() + limit}))\n"
        "def lost_items(folder):\n"
        "    path = folder / 'lost.jsonl'\n"
        "    return [json.loads(line)['item'] for line in path.read_text().splitlines()]"
        " if path.exists() else []",
    )
    script = tmp_path / "child.py"
    script.write_text(text)
    return [sys.executable, "-S", str(script), str(tmp_path)]


@pytest.mark.parametrize("code", [0, 1])
def test_losses_are_noted_and_the_rest_is_done(tmp_path: Path, code: int) -> None:
    assert stage.supervise(child(tmp_path, code), tmp_path, time.time() + 30) == code
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == ["one", "two", "three", "four"]
    assert stage.lost_items(tmp_path) == {
        "hang": "did not come back in time",
        "crash": "ended the process: signal SIGABRT",
        "broken": "broke the GPU's context",
    }


def test_the_deadline_ends_the_child(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    begun = time.time()
    assert stage.supervise(command, tmp_path, begun + 0.5) == stage.DEADLINE
    assert time.time() - begun < 5


def test_children_side_by_side(tmp_path: Path) -> None:
    commands = {}
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        text = f"import sys, time; time.sleep(0.8); sys.exit({number})"
        commands[folder] = [sys.executable, "-S", "-c", text]
    begun = time.time()
    assert stage.supervise_all(commands, begun + 20) == [0, 1, 2]
    assert time.time() - begun < 2.2


def test_a_child_that_dies_before_any_work_is_not_started_again(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import sys; sys.exit(9)"]
    assert stage.supervise(command, tmp_path, time.time() + 20) == 9
    assert stage.lost_items(tmp_path) == {}


def test_what_a_child_does_not_expect_asks_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise ZeroDivisionError("surprise")

    assert stage.run_child(work) == stage.BROKEN
    assert stage.BROKEN not in stage.FINISHED
    assert "surprise" in capsys.readouterr().err


def test_rows_are_appended_behind_one_description(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "bench.jsonl"
    for number in range(2):
        file = stage.RowFile(path, "bench", torch.device("cpu"), commit="abc")
        file.add(event="row", number=number, ratio=1 / 3)
    with path.open("a") as cut:
        cut.write('{"event": "row", "numb')
    start, *rows = stage.read_rows(path)
    assert start["event"] == "start"
    assert start["command"] == "benchmarks/on_gpu.sh bench --device cpu"
    assert start["environment"]["git_hash"] == "abc"
    assert abs(time.time() - start["begun"]) < 60
    assert [row["number"] for row in rows] == [0, 1]
    assert rows[0]["ratio"] == 0.333333
    assert all(row["at_s"] >= 0 for row in rows)


def test_a_new_run_forgets_the_last_one(tmp_path: Path) -> None:
    for name in ("bench.jsonl", "lost.jsonl", "under_way.json", "correct.jsonl"):
        (tmp_path / name).write_text("{}\n")
    stage.clean(tmp_path, "bench")
    assert [path.name for path in tmp_path.iterdir()] == ["correct.jsonl"]
