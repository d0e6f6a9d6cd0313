"""Arguments of the command line; ``cli`` carries the commands out."""

import argparse
from pathlib import Path

import nlkernels


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; the name of the chosen one is in ``command``."""
    whole = argparse.ArgumentParser(
        prog="nlk", description="Train, test and compare video networks with non-local blocks."
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
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
        if name == "train":
            command.add_argument(
                "--dry-run",
                action="store_true",
                help="check files, labels and weights, take two steps and a test batch, and say "
                "which time, memory and disk space the training takes; writes nothing",
            )
        else:
            command.add_argument(
                "--measure-only",
                action="store_true",
                help="measure speed and memory on random clips, train nothing; needs no data",
            )
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    _add_test(commands, names)
    _add_predict(commands)
    _add_prepare(commands)
    _add_convert(commands)
    text = "list networks: parameters, multiply-adds, clips, published accuracy, source, licence"
    models = commands.add_parser("models", help=text, description=text)
    models.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="such as 'i3d*'")
    models.add_argument("--debug", action="store_true", help="show tracebacks")
    _add_bench(commands)
    _add_verify(commands)
    text = "show versions, devices, backends, caches and settings"
    info = commands.add_parser("info", help=text, description=text)
    info.add_argument("--json", action="store_true", help="print the report as JSON")
    info.add_argument("--debug", action="store_true", help="show tracebacks")
    return whole


def _add_test(commands, names: str) -> None:
    text = "test trained networks over all views of the test videos; combine scores"
    test = commands.add_parser("test", help=text, description=text)
    test.add_argument("config", nargs="?", help=f"YAML file, or one of: {names}")
    test.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces the file's value"
    )
    test.add_argument(
        "--weights",
        nargs="+",
        metavar="FILE[:COEFFICIENT]",
        help="of nlk train (.pt) or nlk convert (.safetensors); several are an ensemble",
    )
    test.add_argument(
        "--scores",
        nargs="+",
        metavar="FILE[:COEFFICIENT]",
        help="combine what earlier tests dumped, in place of CONFIG and --weights",
    )
    _add_average(test)
    test.add_argument(
        "--dump", metavar="FILE", help="write the scores of every video: .npz or .jsonl"
    )
    test.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_predict(commands) -> None:
    text = "classify a video, and draw where the non-local blocks look"
    predict = commands.add_parser("predict", help=text, description=text)
    predict.add_argument("video", metavar="VIDEO", help="video file, or folder of its images")
    predict.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="other clips than in its test"
    )
    predict.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="of nlk train (.pt) or nlk convert (.safetensors)",
    )
    predict.add_argument(
        "--classes", metavar="FILE", help="names of the classes (.json, .csv or lines)"
    )
    predict.add_argument(
        "--top", type=int, default=5, metavar="K", help="number of guesses (default: 5)"
    )
    _add_average(predict)
    predict.add_argument(
        "--attention", metavar="NAME", help="draw the attention as NAME.png and NAME.gif"
    )
    predict.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="T,Y,X",
        help="look from this point: frame of the clip, row and column of the video's frame; may be "
        "repeated (default: the three places that the last block changes most)",
    )
    predict.add_argument(
        "--block",
        action="append",
        default=[],
        metavar="NAME",
        help="draw this block only, such as layer3.1; may be repeated",
    )
    predict.add_argument(
        "--clip",
        type=int,
        metavar="N",
        help="draw this clip, from 0 (default: the one that is surest of the answer)",
    )
    predict.add_argument("--device", default="auto", help="auto, cpu or cuda:N (default: auto)")
    predict.add_argument("--debug", action="store_true", help="show tracebacks")


def _add_average(command) -> None:
    command.add_argument(
        "--average",
        choices=("probabilities", "logits"),
        help="what is averaged over views (default: what the network's system averages)",
    )


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


def _add_bench(commands) -> None:
    text = "measure an operation, a block or a network against every implementation present"
    bench = commands.add_parser("bench", help=text, description=text)
    add = bench.add_argument
    add("target", nargs="?", help="softmax, gaussian, ... (see --list), block or model")
    add("name", nargs="?", help="behind model: one of those that nlk models lists")
    add("--list", action="store_true", help="say what can be measured")
    add("--shape", metavar="SIZES", help="such as 2,12544,3136,256,256, or a registered name")
    add("--taps", metavar="KT,KH,KW", help="weight of region (default: 3,7,7)")
    add("--preset", metavar="NAME", help="system whose options a block has")
    add("--kind", metavar="KIND", help="affinity of a block, or of a network's blocks")
    add("--blocks", type=int, default=5, metavar="N", help="of a network (default: 5)")
    add("--width", type=float, default=1.0, help="multiplier of a network's channels (default: 1)")
    add("--channels-last", action="store_true", help="features in channels_last_3d")
    add("--dtype", default="float32", help="float32, bfloat16, float16; several with commas")
    add("--backward", action="store_true", help="also forward and backward, or a training step")
    add("--providers", default="default", metavar="NAMES", help="all, default, or names")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    add("--threads", type=int, metavar="N", help="CPU threads; torch's default if left out")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write all measurements")
    add("--png", type=Path, metavar="FILE", help="draw them; needs matplotlib")
    add("--debug", action="store_true", help="show tracebacks")


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


def _config_folder() -> Path:
    # Found without importing nlkernels.training, whose dependencies may be missing.
    folders = [Path(folder, "training", "configs") for folder in nlkernels.__path__]
    return next((folder for folder in folders if folder.is_dir()), folders[0])
