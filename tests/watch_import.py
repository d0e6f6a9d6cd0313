"""Run by test_import.py in a process of its own: imports the project and prints what that touched.

torch and numpy are imported before the watch begins: what they do is not ours to judge. So is the
counter of FLOPs that the operators register with: torch loads Triton there, where it is installed.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy  # noqa: F401  (imported for its effect)
import torch
import torch.utils.flop_counter

ROOT = str(Path(__file__).resolve().parents[1])
ACTIONS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.system", "os.fork", "os.exec"}
ACTION_MODULES = {"subprocess", "socket", "shutil", "ctypes", "tempfile"}
DEVICE_QUERIES = (
    (torch.cuda, "is_available"),
    (torch.cuda, "device_count"),
    (torch.cuda, "_lazy_init"),
    (torch.cuda, "current_device"),
    (torch.cuda, "get_device_capability"),
    (torch.cuda, "get_device_properties"),
    (torch.cuda, "get_device_name"),
    (torch.backends.cpu, "get_cpu_capability"),
    (torch, "get_num_threads"),
)

opened: list[str] = []
actions: list[str] = []
variables: list[str] = []
device: list[str] = []
read_variable = os._Environ.__getitem__


def audit(event: str, arguments: tuple) -> None:
    if event == "open":
        opened.append(str(arguments[0]))
    elif event in ACTIONS or event.partition(".")[0] in ACTION_MODULES:
        actions.append(event)


def watched_variable(environment: os._Environ, name: str) -> str:
    reader = sys._getframe(1)
    while reader.f_back is not None and reader.f_code.co_filename.startswith("<frozen"):
        reader = reader.f_back
    if name.startswith("NLKERNELS_") or reader.f_code.co_filename.startswith(ROOT):
        variables.append(name)
    return read_variable(environment, name)


def refused(name: str) -> Callable[..., None]:
    def query(*arguments: object) -> None:
        device.append(name)
        raise RuntimeError(f"{name} was called at import")

    return query


def main() -> None:
    heavy = sys.argv[1].split(",")
    loaded_before = set(sys.modules)
    os._Environ.__getitem__ = watched_variable
    for module, name in DEVICE_QUERIES:
        setattr(module, name, refused(f"{module.__name__}.{name}"))
    sys.addaudithook(audit)

    started = time.process_time()
    import nlkernels

    bare_s = time.process_time() - started
    for name in nlkernels.__all__:
        getattr(nlkernels, name)
    public_s = time.process_time() - started
    import nlkernels._ext
    import nlkernels.models
    import nlkernels.training

    seen = {
        "bare_s": bare_s,
        "public_s": public_s,
        "heavy": [name for name in heavy if name in sys.modules and name not in loaded_before],
        "opened": [name for name in opened if not name.endswith((".py", ".pyc", ".so"))],
        "actions": actions,
        "variables": variables,
        "device": device,
    }
    print(json.dumps(seen))


main()
