"""The options that the benchmarks share, and what they settle before the first clock runs."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measure import resolve_device


def add_shared_options(parser: argparse.ArgumentParser, *, output: str, default_batch_size: str = "8") -> None:
    """Add device, sizes, repeats, threads and output."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch-size", type=positive, help=f"pictures in a batch (default: {default_batch_size})")
    parser.add_argument("--image-size", type=positive, help="side of the pictures (default: each network's own)")
    parser.add_argument("--repeats", type=positive, help="samples of each number (default: 10 on a CPU, 50 on a GPU)")
    parser.add_argument("--threads", type=positive, help="threads on a CPU (default: torch's own choice)")
    parser.add_argument("--output", type=Path, default=Path(output), metavar="DIR", help="default: %(default)s")


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: pass 1 or more")
    return number


def settle_device(options: argparse.Namespace) -> torch.device:
    """Find the device, fix the threads, let cuDNN choose its algorithms during warm-up; ValueError if it is missing."""
    device = resolve_device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    return device


def repeats_on(device: torch.device, options: argparse.Namespace) -> int:
    """Return how many samples to take: more on a GPU, where they are short."""
    asked: int | None = options.repeats
    return asked or (50 if device.type == "cuda" else 10)
