"""Command line: ``nlk train | compare | convert | models | verify | info``.

Mistakes of the user end in one line on standard error and exit code 2, everything else that breaks
a run off in one line and exit code 1; ``--debug`` shows the traceback of either. Heavy packages are
imported in the sub-command that needs them.
"""

import argparse
import functools
import importlib.util
import json
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

_NEEDED_BY_EXTRA = {"train": ("yaml", "matplotlib"), "video": ("decord", "av")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0, 1 for a run that broke off, 2 for a mistake of the user.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _COMMANDS[arguments.command](arguments, shlex.join(["nlk", *argv]))
    except KeyboardInterrupt:
        print("nlk: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"nlk {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_mistake_of_the_user(error) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlk", description="Train and compare video networks with non-local blocks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = ", ".join(sorted(path.stem for path in _config_folder().glob("*.yaml")))
    for name, text in (
        ("train", "train and test one network"),
        ("compare", "train and measure the same network with and without blocks"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help=f"YAML file, or one of: {names}")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="replaces the file's value"
        )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    _add_prepare(commands)
    _add_convert(commands)
    text = "list networks: parameters, multiply-adds, clips, published accuracy, source, licence"
    models = commands.add_parser("models", help=text, description=text)
    models.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'i3d*'")
    models.add_argument("--debug", action="store_true", help="show tracebacks")
    _add_verify(commands)
    text = "show versions, devices, backends and settings"
    info = commands.add_parser("info", help=text, description=text)
    info.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_verify(commands) -> None:
    text = "check on this machine that the kernels are right, and use those that are"
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("--op", help="operation, such as softmax; all when left out")
    verify.add_argument("--backend", default="triton", help="backend to check (default: triton)")
    verify.add_argument("--device", help="cuda, cuda:1, cpu; the GPU when left out")
    verify.add_argument("--dtype", help="float16, bfloat16 or float32; all when left out")
    verify.add_argument("--depth", type=int, metavar="D", help="channels of query and key")
    verify.add_argument("--value-depth", type=int, metavar="V", help="channels of value, D if not")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    verify.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_prepare(commands) -> None:
    text = "make lists of a folder of videos; extract frames and flow"
    prepare = commands.add_parser("prepare", help=text, description=text)
    prepare.add_argument("folder", help="train/CLASS/* and test/CLASS/*, or CLASS/*")
    prepare.add_argument("out", help="folder to write")
    prepare.add_argument("--frames", action="store_true", help="extract every frame as an image")
    prepare.add_argument("--flow", action="store_true", help="extract TV-L1 flow; needs OpenCV")
    prepare.add_argument("--short-side", type=int, metavar="PIXELS", help="of extracted images")
    prepare.add_argument(
        "--test-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of each class, where the folder does not say (default: 0.2)",
    )
    prepare.add_argument(
        "--reader", default="auto", choices=("auto", "decord", "av"), help="decoder of the videos"
    )
    prepare.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_convert(commands) -> None:
    text = "read a checkpoint of any system and write it for ours, or for another system"
    convert = commands.add_parser("convert", help=text, description=text)
    convert.add_argument("source", metavar="SRC", help="checkpoint; nothing in it is executed")
    convert.add_argument("target", metavar="DST", help="file to write, when all keys fit")
    convert.add_argument(
        "--from", dest="system", default="auto", help="system, not its file's name"
    )
    convert.add_argument("--to", metavar="SYSTEM", help="system to write for (default: ours)")
    convert.add_argument("--model", metavar="NAME", help="network, where several fit the weights")
    convert.add_argument(
        "--new",
        action="append",
        default=[],
        metavar="WHAT",
        help="starts fresh where the checkpoint has none: blocks, classifier or statistics",
    )
    convert.add_argument("--inflate", action="store_true", help="repeat 2-D convolutions over time")
    convert.add_argument("--entry", help="which weights of a file with several, as state_dict_ema")
    convert.add_argument(
        "--rewrite",
        choices=("affine", "batch", "finetune"),
        help="fold, unfold or strip blobs first",
    )
    convert.add_argument(
        "--classes",
        nargs=2,
        metavar=("THEIRS", "OURS"),
        help="files with names of classes: take these, in this order (.json, .csv or lines)",
    )
    convert.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the model, such as block.kind=concat",
    )
    convert.add_argument("--debug", action="store_true", help="show tracebacks")


def _train(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.config_file import load_config
    from nlkernels.training.train import train_from_config

    config = load_config(arguments.config, arguments.overrides, command=arguments.command)
    print(f"report: {train_from_config(config, command=command)}")
    return 0


def _compare(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.compare import compare_from_config
    from nlkernels.training.config_file import load_config

    config = load_config(arguments.config, arguments.overrides, command=arguments.command)
    print(f"report: {compare_from_config(config, command=command)}")
    return 0


def _prepare(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.data.prepare import prepare

    made = prepare(
        arguments.folder,
        arguments.out,
        test_share=arguments.test_share,
        frames=arguments.frames,
        flow=arguments.flow,
        short_side=arguments.short_side,
        reader=arguments.reader,
    )
    print(
        f"{made.out}: {made.train} training and {made.test} test videos of "
        f"{len(made.classes)} classes"
    )
    for path in made.lists:
        print(f"  {path}")
    for path, reason in made.problems:
        print(f"  left out: {path}: {reason}")
    return 0


def _convert(arguments: argparse.Namespace, command: str) -> int:
    from nlkernels._spec import check_choice
    from nlkernels.models.conversion import convert, parse_options
    from nlkernels.models.convert import NEW

    for group in arguments.new:
        check_choice("convert", "--new", group, NEW)
    print(
        convert(
            arguments.source,
            arguments.target,
            system=arguments.system,
            to=arguments.to,
            name=arguments.model,
            options=parse_options(arguments.option),
            new=tuple(arguments.new),
            inflate=arguments.inflate,
            entry=arguments.entry,
            rewrite=arguments.rewrite,
            classes=arguments.classes,
        )
    )
    return 0


def _models(arguments: argparse.Namespace, command: str) -> int:
    from nlkernels.models.listing import listing

    for line in listing(arguments.pattern):
        print(line, flush=True)
    return 0


def _info(arguments: argparse.Namespace, command: str) -> int:
    from nlkernels import info

    info.main()
    return 0


def _verify(arguments: argparse.Namespace, command: str) -> int:
    import torch

    import nlkernels

    depths = dtypes = None
    if arguments.depth is not None:
        value_depth = arguments.depth if arguments.value_depth is None else arguments.value_depth
        depths = [(arguments.depth, value_depth)]
    elif arguments.value_depth is not None:
        raise ValueError("expected --depth beside --value-depth, got none; add --depth D")
    if arguments.dtype is not None:
        dtypes = [getattr(torch, arguments.dtype, None)]
        if not isinstance(dtypes[0], torch.dtype):
            raise ValueError(
                f"expected --dtype float16, bfloat16 or float32, got {arguments.dtype}"
            )
    report = nlkernels.verify(
        arguments.op,
        arguments.backend,
        device=arguments.device,
        dtypes=dtypes,
        depths=depths,
        # A GPU's kernels are compiled first, which takes minutes for all of them.
        progress=None if arguments.json else functools.partial(print, flush=True),
    )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=1))
    if any(check.verdict == "failed" for check in report.checks):
        return 1
    if report.ok:
        return 0
    print(
        "nlk verify: nothing could be checked; Triton kernels need an NVIDIA GPU, or "
        "TRITON_INTERPRET=1 with --device cpu",
        file=sys.stderr,
    )
    return 2


_COMMANDS = {
    "train": _train,
    "prepare": _prepare,
    "compare": _compare,
    "convert": _convert,
    "models": _models,
    "verify": _verify,
    "info": _info,
}


def _config_folder() -> Path:
    import nlkernels

    # Found without importing nlkernels.training, whose dependencies may be missing.
    folders = [Path(folder, "training", "configs") for folder in nlkernels.__path__]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _require_extras() -> None:
    """Missing packages are named before any work, not when they are first used."""
    for extra, modules in _NEEDED_BY_EXTRA.items():
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"expected the packages of the {extra} extra, got no {module}; "
                    f"pip install 'nlkernels[{extra}]'"
                )


def _is_mistake_of_the_user(error: Exception) -> bool:
    if isinstance(error, TimeoutError):
        return False
    mistakes = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
    # By name: importing its module would load the video packages.
    return isinstance(error, mistakes) or type(error).__name__ == "VideoReadError"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if _is_mistake_of_the_user(error) or type(error).__name__ in ("NonFiniteError", "TimeoutError"):
        return text
    # Nothing that we wrote a message for: say what it was and how to see more.
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as one line without a source location, which tells a user nothing."""
    print(f"nlk: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
