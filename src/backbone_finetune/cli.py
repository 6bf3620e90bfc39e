"""The command line: parse arguments, call recipes, and print errors as one line."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError
from tqdm import tqdm

from .recipes.commands.evaluate import Evaluation, describe_evaluation, evaluate_folder
from .recipes.commands.evaluate_table import evaluate_table
from .recipes.commands.export import EXPORTERS, describe_export
from .recipes.commands.frontier import inspect_frontier
from .recipes.commands.inspect import inspect, inspect_file
from .recipes.commands.predict import choose_writer, list_inputs, predict
from .recipes.commands.report import write_evaluation
from .recipes.commands.run_record import read_run
from .recipes.commands.train import TrainSettings, train
from .recipes.export.onnx_model import export_onnx
from .recipes.models.file import TrainedModel, load_trained_model
from .recipes.models.named import NamedModel, load_timm_model
from .recipes.models.onnx_file import load_onnx_model
from .recipes.objectives.kinds import SingleLabel
from .recipes.text import describe_fault, print_any_name, printable
from .recipes.training.phases import Phase, read_phases
from .recipes.training.processes import find_device

__all__ = ["main"]

PROGRAM = "backbone-finetune"


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    >>> main(["predict", "no such model", "tom.jpg"])
    2

    Args:
        arguments: the arguments. Default: those of the process.

    Returns:
        The exit status: 0, or 2 for a user error, or 130 if interrupted.
    """
    print_any_name()
    try:
        options = build_parser().parse_args(arguments)
        with show_log():
            status: int = options.run_command(options)
        sys.stdout.flush()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, e.g. `| head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        # Of several processes, only the first prints. RANK without WORLD_SIZE means a single process.
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
            message = describe_fault(error) if isinstance(error, ValidationError) else str(error)
            print(f"{PROGRAM}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return status


class LogHandler(logging.Handler):
    """Print the library's log messages: information on stdout, warnings on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


@contextmanager
def show_log() -> Iterator[None]:
    """Print the library's log messages in the block, and restore the logging configuration after it."""
    logger, handler = logging.getLogger("backbone_finetune"), LogHandler()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def build_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(prog=PROGRAM, description="Fine-tune any timm network with its backbone frozen.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands.add_parser("train", help="train a classifier on images"))
    add_predict(commands.add_parser("predict", help="predict the most likely classes of images"))
    add_evaluate(commands.add_parser("evaluate", help="measure a trained model on images of known classes"))
    add_export(commands.add_parser("export", help="write a trained model in the format of where it will run"))
    add_inspect(commands.add_parser("inspect", help="print layer groups, parameters and cost of a network"))
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train``."""
    settings = TrainSettings()
    parser.description = (
        "Train a classifier on images, on a frozen backbone. Without arguments: on the packaged clipart (ten "
        "classes), with EfficientNet-Lite0 and its packaged ImageNet weights; nothing is downloaded. To resume a "
        "stopped run, give the same command again."
    )
    # No defaults here: only options that were given conflict with --phases and --run.
    add, switch = parser.add_argument, partial(parser.add_argument, action="store_true", default=None)
    add(
        "images",
        nargs="?",
        type=Path,
        metavar="DATA",
        help="a folder with a sub-folder of images per class, or with train, val and test of such folders; or a table "
        "with the columns path, label (or labels, as cat;dog) and, optionally, split (.csv, .tsv)",
    )
    add(
        "--validation",
        type=Path,
        metavar="DATA",
        help="images to choose on (default: DATA's val); without test images and --monitor, they are tested on",
    )
    add(
        "--test",
        type=Path,
        metavar="DATA",
        help="images to test on, once (default: DATA's test, else its val if nothing is chosen on it, else a share)",
    )
    add(
        "--monitor",
        choices=("accuracy", "balanced-accuracy", "loss", "off"),
        help="keep the epoch that is best on the validation images (default: accuracy where there are validation and "
        "test images, else off; without validation images, a fifth of the training images is held out)",
    )
    add("--patience", type=int, metavar="N", help="end a phase after N epochs that are no better")
    add("--folds", type=int, metavar="K", help="cross-validate on the training images in K folds too")
    add(
        "--model",
        dest="architecture",
        metavar="NAME",
        help="an architecture of timm, local-dir:FOLDER or hf-hub:OWNER/NAME (default: tf_efficientnet_lite0, packaged "
        "weights)",
    )
    weights = parser.add_mutually_exclusive_group()
    text = "timm's pretrained weights from the hub, or those of the folder"
    weights.add_argument("--pretrained", action="store_true", default=None, help=text)
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file")
    add("--phases", type=Path, metavar="FILE", help="a TOML file with a [[phases]] table for each phase")
    one_phase = parser.add_argument_group("one phase (for several, use --phases)")
    add_numbers(
        one_phase,
        Phase(),
        ("epochs", "N", ""),
        ("trainable_groups", "N", "number of last layer groups of the backbone that train; "),
        ("lr", "RATE", "of the classifier; chosen among 8 where it trains on features; "),
        ("backbone_lr", "RATE", ""),
        ("layer_decay", "FACTOR", "factor on the rate for each layer towards the input; "),
        ("weight_decay", "W", ""),
        ("warmup_epochs", "N", "epochs, or a fraction of one, in which the rates rise from 0; "),
    )
    one_phase.add_argument("--cosine", action="store_true", default=None, help="let the rates fall to 0 at the end")
    one_phase.add_argument(
        "--norm-eval",
        action=argparse.BooleanOptionalAction,
        help="keep running statistics fixed even if weights train (default: yes; no for random weights)",
    )
    add("--run", type=Path, metavar="FILE", help="a run.json: repeat that run, into another folder")
    add_numbers(
        parser,
        settings,
        ("seed", "S", ""),
        ("batch_size", "N", "images per step, in all processes together; "),
        ("accumulation", "N", "split each batch into N parts, to save memory; "),
        ("checkpoint_steps", "N", "write a checkpoint every N steps, and after each epoch; "),
    )
    add(
        "--class-weights",
        choices=("balanced",),
        help="weight the loss of each image by N / (K * images of its class), for N images in K classes",
    )
    add_numbers(parser, settings, ("label_smoothing", "SHARE", "share of each target spread over all classes; "))
    add(
        "--regression",
        type=lambda text: tuple(name.strip() for name in text.split(",")),
        metavar="COLUMN[,COLUMN]",
        help="columns of a table whose numbers are predicted, instead of a class or labels",
    )
    add("--workers", type=int, metavar="N", help="processes that load images (default: by cores and images)")
    add(
        "--cache",
        choices=("auto", "memory", "disk", "off"),
        help="where to cache the frozen features; off runs the whole model in every step (default: auto)",
    )
    add("--views", type=int, metavar="K", help="cache K augmented views of each training image (default: 1, unchanged)")
    add(
        "--compile",
        choices=("inductor", "openvino"),
        help="compile the frozen backbone; openvino (an extra) is faster on a CPU from about 5,000 images",
    )
    add("--output", type=Path, metavar="DIR", help=f"default: {settings.output}")
    add(
        "--device",
        metavar="NAME",
        help=f"auto, cpu, cuda, cuda:1, mps (default: {settings.device}: CUDA, else MPS, else cpu)",
    )
    add(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="default: the launcher's, or no; unless no is given, features are in bf16 where that is faster",
    )
    switch("--trainable-only", help="write only the tensors that training changed; loading needs the base weights")
    switch("--baselines", help="also train on a random backbone and on raw pixels, to compare (always for the clipart)")
    switch("--overwrite", help="replace a finished model, or another run, in the output folder")
    parser.set_defaults(run_command=run_train)


def add_numbers(parser: argparse._ActionsContainer, settings: object, *options: tuple[str, str, str]) -> None:
    """Add numeric options ``(name, metavar, help)``, with the types and defaults of ``settings``."""
    for name, metavar, text in options:
        default = getattr(settings, name)
        read, shown = (float, "none") if default is None else (type(default), default)
        parser.add_argument(f"--{name.replace('_', '-')}", type=read, metavar=metavar, help=f"{text}default: {shown}")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``predict``."""
    parser.description = (
        "Print the most likely classes of images, with a model that `train` or `export --to onnx` wrote. Images that "
        "cannot be read are listed and counted, and the exit status is then 2."
    )
    add_inference(parser)
    add = parser.add_argument
    text = "an image, a folder of images at any depth, a pattern ('photos/**/*.jpg'), or - for paths on stdin by line"
    add("images", nargs="+", metavar="IMAGE", help=text)
    add("--top-k", type=int, default=3, metavar="K", help="classes for each image (default: %(default)s)")
    text = "write the predictions to a .csv or .jsonl file (JSON lines) instead of the terminal"
    add("--output", type=Path, metavar="FILE", help=text)
    parser.set_defaults(run_command=run_predict)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``evaluate``."""
    parser.description = (
        "Measure a model that `train` wrote on images of known classes: accuracy, precision and recall by class, and "
        "a confusion matrix."
    )
    add_inference(parser)
    add = parser.add_argument
    add(
        "images",
        type=Path,
        metavar="DATA",
        help="a folder with a sub-folder for each of the model's classes, or a table; a test split in it is used alone",
    )
    add(
        "--output",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder for report.html, evaluation.json, predictions.csv and confusion.png (default: %(default)s)",
    )
    parser.set_defaults(run_command=run_evaluate)


def add_inference(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model, the device and the batch size."""
    add = parser.add_argument
    add_model(parser, "model.safetensors of `train`, .onnx of `export`, local-dir:FOLDER or hf-hub:OWNER/NAME")
    add("--batch-size", type=int, default=32, metavar="N", help="images per batch (default: %(default)s)")
    add("--workers", type=int, metavar="N", help="processes that read images (default: by cores and images)")
    add("--tta", action="store_true", help="average over each image and its mirror image, at twice the cost")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, ... (default: %(default)s)")


def add_model(parser: argparse.ArgumentParser, text: str) -> None:
    """Add the arguments that name a trained model."""
    parser.add_argument("model", type=Path, metavar="MODEL", help=text)
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FILE",
        help="the base weights of a model of --trainable-only, if they are not found automatically",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``export``."""
    parser.description = (
        "Write a model that `train` wrote in another format: timm (a plain checkpoint, with a class map), hub-folder "
        "(for timm.create_model('local-dir:...')), onnx, torch-export or openvino. It is loaded again and gives the "
        "model's logits, or nothing is written."
    )
    add = parser.add_argument
    add_model(parser, "the model.safetensors that `train` wrote")
    add("output", type=Path, metavar="OUTPUT", help="the file or, for hub-folder, the folder to write; not there yet")
    add("--to", choices=sorted(EXPORTERS), required=True, help="the format")
    add("--images", nargs="+", metavar="IMAGE", help="images, folders or patterns on which the logits are compared")
    text = "onnx: the graph itself resizes, crops and normalizes; its input is images in uint8, (B, height, width, 3)"
    add("--preprocessing", action="store_true", help=text)
    parser.set_defaults(run_command=run_export)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect``."""
    parser.description = (
        "Print the layer groups, parameters and cost (floating-point operations of a forward pass of one image) of an "
        "architecture of timm, or of a trained model and which of its groups are frozen. Nothing is downloaded but the "
        "config.json of hf-hub:OWNER/NAME."
    )
    parser.add_argument("network", metavar="NAME|MODEL", help="an architecture, local-dir:FOLDER, or model.safetensors")
    parser.add_argument(
        "--trainable-groups",
        type=int,
        metavar="N",
        help="also print what can be cached while the last N layer groups of an architecture train; this runs it",
    )
    parser.set_defaults(run_command=run_inspect)


def run_train(options: argparse.Namespace) -> int:
    """Run ``train``; raise ValueError for --run with an option that the recorded run already has."""
    names = [field.name for field in fields(TrainSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if options.run is None:
        train(TrainSettings(**{**given, "phases": choose_phases(options)}))
        return 0
    for name in dict.fromkeys((*names, *(field.name for field in fields(Phase)))):
        if (
            name not in {"output", "overwrite", "device", "baselines", "workers", "cache"}
            and getattr(options, name, None) is not None
        ):
            option = {"images": "DATA", "architecture": "--model"}.get(name, f"--{name.replace('_', '-')}")
            raise ValueError(
                f"{option} and --run {options.run} were both given; the file has all options except --output, "
                "--overwrite, --device, --baselines, --workers and --cache"
            )
    settings, recorded = read_run(options.run)
    train(replace(settings, **given), recorded=recorded)
    return 0


def choose_phases(options: argparse.Namespace) -> tuple[Phase, ...]:
    """Return the phases of a file, or one phase from the options; raise ValueError if both were given."""
    names = [field.name for field in fields(Phase)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.phases is None:
        return (Phase(**given),)
    if given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise ValueError(f"{option} and --phases {options.phases} were both given; write it into the file's phases")
    return read_phases(options.phases)


def load_model(options: argparse.Namespace) -> TrainedModel | NamedModel:
    """Load the given model onto the given device."""
    if options.model.suffix == ".onnx":
        if options.base is not None or options.device not in {"auto", "cpu"}:
            raise ValueError(f"{options.model}: an ONNX file runs on the CPU and takes no --base")
        return load_onnx_model(options.model)
    device = find_device(options.device)
    trained: TrainedModel | NamedModel
    if str(options.model).startswith(("local-dir:", "hf-hub:")):
        trained = load_timm_model(str(options.model))
    else:
        trained = load_trained_model(options.model, base=options.base)
    trained.model.to(device)
    return trained


def run_predict(options: argparse.Namespace) -> int:
    """Run ``predict``: print a line for each image; raise ValueError if one could not be read."""
    paths = list_inputs(options.images)
    trained = load_model(options)
    predictions = predict(
        trained, paths, top_k=options.top_k, batch_size=options.batch_size, workers=options.workers, tta=options.tta
    )
    write = None
    if options.output is not None:
        write = choose_writer(options.output, min(options.top_k, len(trained.class_names)), trained)
    # A bar where no line is printed in the terminal.
    silent = write is None and sys.stdout.isatty()
    bar = tqdm(
        predictions if write is None else write(predictions),
        total=len(paths),
        desc="predicting",
        unit="image",
        leave=False,
        disable=True if silent else None,  # None: where stderr is no terminal
    )
    unreadable = 0
    for prediction in bar:
        if prediction.error is None and write is None:
            answers = [f"{name} {share:.1%}" for name, share in prediction.classes]
            answers += [f"{name} {value:.6g}" for name, value in prediction.values]
            print(printable(f"{prediction.path}: {', '.join(answers) or 'no label'}"))
        elif prediction.error is not None:
            tqdm.write(printable(f"{PROGRAM}: skipped: {prediction.error}"), file=sys.stderr)
            unreadable += 1
    if write is not None:
        print(f"wrote {options.output}: {len(paths) - unreadable} images")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(paths)} images could not be read")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Run ``evaluate``: print a table by class, and a line for each image that was skipped."""
    trained = load_model(options)
    of_classes = isinstance(trained.objective, SingleLabel)
    evaluation = (evaluate_folder if of_classes else evaluate_table)(
        trained, options.images, batch_size=options.batch_size, workers=options.workers, tta=options.tta
    )
    for message in evaluation.skipped_images:
        print(printable(f"{PROGRAM}: skipped: {message}"), file=sys.stderr)
    if isinstance(evaluation, Evaluation):
        print(describe_evaluation(evaluation))
        title = f"{options.model.name} on {options.images}"
        print(f"wrote {', '.join(map(str, write_evaluation(evaluation, options.output, title=title)))}")
    else:
        print(f"{evaluation.describe()}\nwrote {evaluation.write(options.output)}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Run ``export``: print what was written."""
    if options.preprocessing and options.to != "onnx":
        raise ValueError(f"--preprocessing was given, and --to is {options.to}; it is for onnx alone")
    images = list_inputs(options.images) if options.images else []
    export = partial(export_onnx, preprocessing=True) if options.preprocessing else EXPORTERS[options.to]
    exported = export(load_trained_model(options.model, base=options.base), options.output, images=images)
    for line in describe_export(exported).splitlines():
        print(printable(line))
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """Run ``inspect`` on a model file, or else on the name of an architecture."""
    path, groups = Path(options.network), options.trainable_groups
    if path.suffix == ".safetensors" or path.is_file():
        if groups is not None:
            raise ValueError(f"--trainable-groups and the model file {path} were both given; pass an architecture")
        print(inspect_file(path))
    else:
        parts = [inspect(options.network), *([] if groups is None else [inspect_frontier(options.network, groups)])]
        print("\n\n".join(parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
