"""The command line: parse arguments, call recipes, and print errors as one line."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import ValidationError
from tqdm import tqdm

from .recipes.commands.arguments import EXPORTERS, add_evaluate, add_export, add_inspect, add_predict, add_train
from .recipes.commands.evaluate import evaluate_images
from .recipes.commands.inspect import inspect, inspect_file, inspect_frontier
from .recipes.commands.predict import list_inputs, predict
from .recipes.commands.prediction_files import choose_writer
from .recipes.commands.reporting.evaluation_files import write_evaluation
from .recipes.commands.runs.run_record import NOT_RECORDED, read_run
from .recipes.commands.settings import TrainSettings
from .recipes.commands.train import train
from .recipes.data.augmentation import AUGMENTATIONS
from .recipes.export.onnx_model import export_onnx
from .recipes.files import check_output
from .recipes.memory import keep_freed_memory
from .recipes.models.file import TrainedModel, load_trained_model
from .recipes.models.named import NamedModel, load_timm_model
from .recipes.models.onnx_file import load_onnx_model
from .recipes.text import describe_fault, print_any_name, printable
from .recipes.together import OUT_OF_MEMORY, is_on_all_processes
from .recipes.training.phases import Phase, read_phases
from .recipes.training.processes import find_device

PROGRAM = "backbone-finetune"


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def run() -> int:
    """Run the command line in a process of its own, which is set up for it."""
    gc.freeze()  # the modules stay: collections need not visit them, the last one at exit included
    keep_freed_memory()
    return main()


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
    except (ValueError, OSError, ModuleNotFoundError, *OUT_OF_MEMORY) as error:
        if isinstance(error, BrokenPipeError):  # the reader, e.g. `| head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        # Of several processes, the first prints what all meet. RANK without WORLD_SIZE means a single process.
        rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
        if rank == "0" or not _is_met_by_first(error):
            message = describe_fault(error) if isinstance(error, ValidationError) else str(error) or "out of memory"
            where = "" if rank == "0" else f" in process {rank}"
            print(f"{PROGRAM}: error{where}: {printable(' '.join(message.split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return status


def _is_met_by_first(error: Exception) -> bool:
    """Return whether the first process, or the first one on this machine, meets an error too and prints it."""
    if isinstance(error, ValidationError) or is_on_all_processes(error):
        return True
    # Before the processes know each other, each has checked no more than the arguments and its machine.
    know_each_other = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not know_each_other and os.environ.get("LOCAL_RANK", "0") != "0"


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
    for name, text, add_arguments, run_command in (
        ("train", "train a classifier on images", add_train, run_train),
        ("predict", "predict the most likely classes of images", add_predict, run_predict),
        ("evaluate", "measure a trained model on images of known classes", add_evaluate, run_evaluate),
        ("export", "write a trained model in the format of where it will run", add_export, run_export),
        ("inspect", "print layer groups, parameters and cost of a network", add_inspect, run_inspect),
    ):
        command = commands.add_parser(name, help=text)
        add_arguments(command)
        command.set_defaults(run_command=run_command)
    return parser


def run_train(options: argparse.Namespace) -> int:
    """Run ``train``; raise ValueError for --run with an option that the recorded run already has."""
    names = [field.name for field in fields(TrainSettings)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if options.run is None:
        train(TrainSettings(**{**given, "phases": choose_phases(options)}))
        return 0
    may_differ = NOT_RECORDED | {"device"}
    for name in dict.fromkeys((*names, *(field.name for field in fields(Phase)))):
        if name not in may_differ and getattr(options, name, None) is not None:
            option = {"images": "DATA", "architecture": "--model"}.get(name, name_option(name, getattr(options, name)))
            *others, last = (f"--{other.replace('_', '-')}" for other in sorted(may_differ))
            raise ValueError(
                f"{option} and --run {options.run} were both given; the file has all options except "
                f"{', '.join(others)} and {last}"
            )
    settings, recorded = read_run(options.run)
    train(replace(settings, **given), recorded=recorded)
    return 0


def name_option(name: str, value: object) -> str:
    """Return the option that sets a setting to a value.

    >>> name_option("norm_eval", False)
    '--no-norm-eval'
    """
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def choose_phases(options: argparse.Namespace) -> tuple[Phase, ...]:
    """Return the phases of a file, or one phase from the options; raise ValueError if both were given."""
    names = [field.name for field in fields(Phase)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.tune and (given or options.phases is not None):
        option = name_option(*next(iter(given.items()))) if given else "--phases"
        raise ValueError(f"--tune and {option} were both given; --tune chooses the phases, and --phases takes yours")
    if options.phases is None:
        if "augment" in given:
            given["augment"] = AUGMENTATIONS[given["augment"]]
            if given["augment"] is None and (options.views or 1) > 1:
                raise ValueError(
                    f"--augment none and --views {options.views} were both given; views are of an augmentation"
                )
        return (Phase(**given),)
    if given:
        option = name_option(*next(iter(given.items())))
        raise ValueError(f"{option} and --phases {options.phases} were both given; write it into the file's phases")
    return read_phases(options.phases)


def load_model(options: argparse.Namespace) -> TrainedModel | NamedModel:
    """Load the given model onto the given device."""
    if options.model.suffix == ".onnx":
        if options.base is not None or options.device not in {"auto", "cpu"}:
            raise ValueError(f"{options.model}: an ONNX file runs on the CPU and takes no --base")
        return load_onnx_model(options.model)
    if options.model.suffix in {".xml", ".pt2"}:  # of `export`, to be run elsewhere
        raise ValueError(f"{options.model}: give a .safetensors or .onnx file, local-dir:FOLDER or hf-hub:OWNER/NAME")
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
    write = None
    if options.output is not None:
        write = choose_writer(options.output, min(options.top_k, len(trained.class_names)), trained)
    predictions = predict(
        trained, paths, top_k=options.top_k, batch_size=options.batch_size, workers=options.workers, tta=options.tta
    )
    bar = tqdm(
        predictions if write is None else write(predictions),
        total=len(paths),
        desc="predicting",
        unit="image",
        leave=False,
        # Lines of predictions would be between its own, also those that another program prints from a pipe.
        disable=True if write is None else None,  # None: where stderr is no terminal
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
        print(f"wrote {options.output}: {(count := len(paths) - unreadable)} image{'s' * (count != 1)}")
    if unreadable:
        raise ValueError(f"{unreadable} of {len(paths)} images could not be read")
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Run ``evaluate``: print a table by class, and a line for each image that was skipped."""
    check_output(options.output)
    trained = load_model(options)
    evaluation = evaluate_images(
        trained,
        options.images,
        batch_size=options.batch_size,
        workers=options.workers,
        tta=options.tta,
        neighbors=options.neighbors,
    )
    for message in evaluation.skipped_images:
        print(printable(f"{PROGRAM}: skipped: {message}"), file=sys.stderr)
    print(evaluation.describe())
    title = f"{options.model} on {options.images}"
    print(f"wrote {', '.join(map(str, write_evaluation(evaluation, options.output, title=title)))}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    """Run ``export``: print what was written."""
    if options.preprocessing and options.to != "onnx":
        raise ValueError(f"--preprocessing was given, and --to is {options.to}; it is for onnx alone")
    images = list_inputs(options.images) if options.images else []
    export = partial(export_onnx, preprocessing=True) if options.preprocessing else EXPORTERS[options.to]
    exported = export(load_trained_model(options.model, base=options.base), options.output, images=images)
    for line in exported.describe().splitlines():
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
    sys.exit(run())
