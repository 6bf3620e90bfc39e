"""The command line: arguments in, recipes called, errors as one line. No logic of its own."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from .recipes.inspection import inspect
from .recipes.model_file import load_trained_model
from .recipes.prediction import predict
from .recipes.run import TrainSettings, train
from .recipes.training import Hyperparameters

__all__ = ["main"]

PROGRAM = "backbone-finetune"
NumberT = TypeVar("NumberT", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all errors of this command line are.

    >>> Parser().parse_args([])
    Namespace()
    """

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"{PROGRAM}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: returns 0, or 2 for a mistake of the user's, 130 when interrupted.

    >>> main(["predict", "no such model", "tom.jpg"])
    2
    """
    options = build_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, BrokenPipeError):  # `... | head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    return status


def build_parser() -> Parser:
    """Describe the arguments.

    >>> build_parser().parse_args(["inspect", "resnet18"]).architecture
    'resnet18'
    """
    parser = Parser(prog=PROGRAM, description="Fine-tune any timm network with its backbone frozen.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands.add_parser("train", help="train a classifier on pictures"))
    add_predict(commands.add_parser("predict", help="name the likeliest classes of pictures"))
    add_inspect(commands.add_parser("inspect", help="print the layer groups of an architecture"))
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `train`."""
    defaults, settings = Hyperparameters(), TrainSettings()
    parser.description = (
        "Train a classifier on pictures, above a frozen backbone. With no arguments: on the packaged clipart (ten "
        "classes), above EfficientNet-Lite0 with packaged ImageNet weights; nothing is downloaded."
    )
    add = parser.add_argument
    add("pictures", nargs="?", type=Path, metavar="PATH", help="a folder with a sub-folder of pictures per class")
    add("--model", metavar="NAME", help="any architecture of timm (default: tf_efficientnet_lite0, packaged weights)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights, from the hub")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file")
    add("--epochs", type=positive_integer, default=defaults.epochs, metavar="N", help="default: %(default)s")
    add("--seed", type=natural_number, default=defaults.seed, metavar="S", help="default: %(default)s")
    add(
        "--trainable-groups",
        type=natural_number,
        default=settings.trainable_groups,
        metavar="N",
        help="layer groups of the backbone that train too, from the output (default: %(default)s; see `inspect`)",
    )
    add("--lr", type=positive_number, default=defaults.lr, metavar="RATE", help="default: %(default)s")
    add(
        "--backbone-lr", type=positive_number, default=defaults.backbone_lr, metavar="RATE", help="default: %(default)s"
    )
    add(
        "--weight-decay",
        type=non_negative_number,
        default=defaults.weight_decay,
        metavar="W",
        help="default: %(default)s",
    )
    add("--batch-size", type=positive_integer, default=defaults.batch_size, metavar="N", help="default: %(default)s")
    add("--output", type=Path, default=settings.output, metavar="DIR", help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace a finished model in the output folder")
    add("--device", default=settings.device, help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.set_defaults(run=run_train)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `predict`."""
    parser.description = "Name the likeliest classes of pictures, by a model that `train` wrote."
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model.safetensors that `train` wrote")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument(
        "--top-k", type=positive_integer, default=3, metavar="K", help="classes for each picture (default: %(default)s)"
    )
    parser.set_defaults(run=run_predict)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of `inspect`."""
    parser.description = "Print the layer groups and parameters of an architecture of timm. Nothing is downloaded."
    parser.add_argument("architecture", metavar="NAME")
    parser.set_defaults(run=run_inspect)


def run_train(options: argparse.Namespace) -> int:
    """Carry out `train`."""
    train(
        TrainSettings(
            pictures=options.pictures,
            architecture=options.model,
            pretrained=options.pretrained,
            checkpoint=options.checkpoint,
            trainable_groups=options.trainable_groups,
            hyperparameters=Hyperparameters(
                epochs=options.epochs,
                batch_size=options.batch_size,
                lr=options.lr,
                backbone_lr=options.backbone_lr,
                weight_decay=options.weight_decay,
                seed=options.seed,
            ),
            output=options.output,
            overwrite=options.overwrite,
            device=options.device,
        )
    )
    return 0


def run_predict(options: argparse.Namespace) -> int:
    """Carry out `predict`: a line for each picture, and status 2 when one could not be read."""
    unreadable = 0
    for prediction in predict(load_trained_model(options.model), options.pictures, top_k=options.top_k):
        if prediction.error is None:
            print(f"{prediction.path}: {', '.join(f'{name} {share:.1%}' for name, share in prediction.classes)}")
        else:
            print(f"{PROGRAM}: skipped: {prediction.error}", file=sys.stderr)
            unreadable += 1
    if unreadable:
        raise ValueError(f"{unreadable} of {len(options.pictures)} pictures could not be read")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """Carry out `inspect`."""
    print(inspect(options.architecture))
    return 0


def positive_integer(text: str) -> int:
    """Read 1, 2, 3, ...

    >>> positive_integer("3")
    3
    """
    return checked(text, int, "a whole number from 1", lambda value: value >= 1)


def natural_number(text: str) -> int:
    """Read 0, 1, 2, ... up to what a seed may be.

    >>> natural_number("0")
    0
    """
    return checked(text, int, "a whole number from 0", lambda value: 0 <= value < 2**63)


def positive_number(text: str) -> float:
    """Read a number above 0.

    >>> positive_number("1e-3")
    0.001
    """
    return checked(text, float, "a number above 0", lambda value: 0 < value < math.inf)


def non_negative_number(text: str) -> float:
    """Read a number from 0.

    >>> non_negative_number("0")
    0.0
    """
    return checked(text, float, "a number from 0", lambda value: 0 <= value < math.inf)


def checked(text: str, read: Callable[[str], NumberT], expected: str, is_allowed: Callable[[NumberT], bool]) -> NumberT:
    """Read a number and check it, or tell argparse what was expected.

    >>> checked("0", int, "a whole number from 1", lambda value: value >= 1)
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: '0': expected a whole number from 1
    """
    try:
        value = read(text)
    except ValueError:
        pass
    else:
        if is_allowed(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
