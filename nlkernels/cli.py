"""Command line: ``nlk COMMAND ...``; the commands and their arguments are in ``_commands``.

Mistakes of the user end in one line on standard error and exit code 2, everything else that breaks
a run off in one line and exit code 1; ``--debug`` shows the traceback of either. Heavy packages are
imported in the sub-command that needs them.
"""

import argparse
import functools
import importlib.util
import json
import os
import select
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

from nlkernels._commands import parser

# Errors of a run that broke off whose messages say everything, by name as below.
_EXPLAINED = ("NonFiniteError", "TimeoutError", "WorkerLostError")
_NEEDED_BY_EXTRA = {"train": ("yaml", "matplotlib"), "video": ("decord", "av")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; those of the process if None.

    Returns:
        Exit code: 0, 1 for a run that broke off, 2 for a mistake of the user, 130 where Ctrl-C
        ended it, 141 where the reader of its output has gone, as in `nlk models | head -1`.
    """
    try:
        try:
            return _main(sys.argv[1:] if argv is None else list(argv))
        finally:
            # Here, where a reader that has gone is no error; --help ends the process.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # What is left is written at the end of the process: to nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: list[str]) -> int:
    arguments = _parsed(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _COMMANDS[arguments.command](arguments, shlex.join(["nlk", *argv]))
    except KeyboardInterrupt:
        print("nlk: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise
        if arguments.debug:
            traceback.print_exc()
        print(f"nlk {arguments.command}: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_mistake_of_the_user(error) else 1


def _reader_has_gone() -> bool:
    """Whether the pipe that broke is the one of standard output."""
    try:
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        # A system without polling, or an output that is no file.
        return False
    return bool(watch.poll(0))


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; section.key=value may stand in front of options and behind them."""
    whole = parser()
    arguments, rest = whole.parse_known_args(argv)
    behind = [text for text in rest if "=" in text and not text.startswith("-")]
    if len(behind) < len(rest) or (behind and not hasattr(arguments, "overrides")):
        whole.error(f"unrecognized arguments: {' '.join(rest)}")
    if behind:
        arguments.overrides = [*arguments.overrides, *behind]
    return arguments


def _train(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.config_file import load_config
    from nlkernels.training.dry_run import dry_run
    from nlkernels.training.train import train_from_config

    config = load_config(arguments.config, arguments.overrides, command=arguments.command)
    if arguments.dry_run:
        return 1 if dry_run(config).problems else 0
    print(f"report: {train_from_config(config, command=command)}")
    return 0


def _test(arguments: argparse.Namespace, command: str) -> int:
    tests = arguments.weights is not None
    if tests == (arguments.scores is not None) or tests == (arguments.config is None):
        raise ValueError(
            "test: expected CONFIG --weights FILE ..., or --scores FILE ... and no CONFIG, got "
            f"{command!r}; write section.key=value in front of the options"
        )
    _require_extras()
    from nlkernels.training.config_file import load_config
    from nlkernels.training.testing import run_combination, run_test

    if tests:
        config = load_config(arguments.config, arguments.overrides, command=arguments.command)
        run_test(config, arguments.weights, average=arguments.average, dump=arguments.dump)
        return 0
    if arguments.average is not None:
        raise ValueError(
            "test: expected no --average beside --scores, which have been averaged, got "
            f"{arguments.average}; leave it out"
        )
    run_combination(arguments.scores, dump=arguments.dump)
    return 0


def _predict(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.predict import parse_point, predict, spoken

    prediction = predict(
        arguments.video,
        arguments.weights,
        overrides=arguments.overrides,
        classes=arguments.classes,
        top=arguments.top,
        average=arguments.average,
        attention=arguments.attention,
        at=[parse_point(text) for text in arguments.at],
        blocks=arguments.block,
        clip=arguments.clip,
        device=arguments.device,
    )
    print("\n".join([arguments.video, *spoken(prediction)]))
    return 0


def _compare(arguments: argparse.Namespace, command: str) -> int:
    _require_extras()
    from nlkernels.training.compare import compare_from_config
    from nlkernels.training.config_file import load_config

    config = load_config(arguments.config, arguments.overrides, command=arguments.command)
    path = compare_from_config(config, command=command, measure_only=arguments.measure_only)
    print(f"report: {path}")
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


def _bench(arguments: argparse.Namespace, command: str) -> int:
    from nlkernels.benchmarks.bench_command import run

    return run(arguments, command)


def _info(arguments: argparse.Namespace, command: str) -> int:
    from nlkernels import info

    info.main(["--json"] if arguments.json else [])
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
        "nlk verify: nothing could be checked; its kernels need an NVIDIA GPU, or those of Triton "
        "TRITON_INTERPRET=1 with --device cpu",
        file=sys.stderr,
    )
    return 2


_COMMANDS = {
    "train": _train,
    "test": _test,
    "predict": _predict,
    "prepare": _prepare,
    "compare": _compare,
    "convert": _convert,
    "models": _models,
    "bench": _bench,
    "verify": _verify,
    "info": _info,
}


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
    if _is_mistake_of_the_user(error) or type(error).__name__ in _EXPLAINED:
        return text
    # Nothing that we wrote a message for: say what it was and how to see more.
    return f"{type(error).__name__}: {text}; run again with --debug for the traceback"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as one line without a source location, which tells a user nothing."""
    print(f"nlk: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
