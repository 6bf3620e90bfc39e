"""The common options of the benchmarks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from harness.timing import resolve_device

_IMAGE_SIZE = "side of the images (default: each network's own; the article's networks always use 64)"


def add_shared_options(
    parser: argparse.ArgumentParser, *, output: str, batch_size: int = 8, batch_size_on_cuda: int = 256
) -> None:
    """Add device, sizes, repeats, threads and output; a GPU needs a larger batch to be busier than the host."""
    parser.set_defaults(default_batch_size={"cpu": batch_size, "cuda": batch_size_on_cuda})
    sizes = f"images per batch (default: {batch_size} on a CPU, {batch_size_on_cuda} on a GPU)"
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch-size", type=positive, help=sizes)
    parser.add_argument("--image-size", type=positive, help=_IMAGE_SIZE)
    parser.add_argument("--repeats", type=positive, help="samples of each number (default: 10 on a CPU, 50 on a GPU)")
    parser.add_argument("--threads", type=positive, help="threads on a CPU (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="default: %(default)s")


def add_precision_options(parser: argparse.ArgumentParser) -> None:
    """Add autocast and the memory format."""
    parser.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast to this type")
    parser.add_argument("--channels-last", action="store_true", help="store weights and images channels last")


def batch_size_on(device: torch.device, options: argparse.Namespace) -> int:
    """Return the batch size: the given one, or the default for the device."""
    asked: int | None = options.batch_size
    return asked or int(options.default_batch_size[device.type])


def add_models_option(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add the names of the networks to measure."""
    parser.add_argument("--models", nargs="+", action=_EachOnce, default=list(default), metavar="NAME")


class _EachOnce(argparse.Action):
    """Keeps the first of equal values: rows are by name, so a network measured twice would mix its rows."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: pass 1 or more")
    return number


def settle_device(options: argparse.Namespace) -> torch.device:
    """Find the device, fix the threads, let cuDNN choose its algorithms during warm-up, and try the output folder.

    Raises ValueError before any measurement if the device is missing or the folder cannot be written.
    """
    device = resolve_device(options.device)
    make_writable(options.output)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    return device


def make_writable(folder: Path) -> None:
    """Create a folder and check that files can be written; raise ValueError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror}; pass a folder that can be written.") from error


def repeats_on(device: torch.device, options: argparse.Namespace) -> int:
    """Return the number of samples: more on a GPU, where they are short."""
    asked: int | None = options.repeats
    return asked or (50 if device.type == "cuda" else 10)
