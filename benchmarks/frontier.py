"""What the frontier saves: a cached step against the trainable rest alone, and 20 epochs against the article's recipe.

    OMP_NUM_THREADS=1 python benchmarks/frontier.py

CPU time of whole steps (forward, loss, backward, optimizer) on the CPU, in turns, so that a busy machine counts little.
The epochs are put together from the steps, the search and the recording of one pass, for `--images` images; reading
images is left out on both sides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness.environment import describe_command, describe_environment
from harness.ratios import Paired, TargetReport, compared, write_targets
from harness.timing import no_garbage_collection, take_turns
from subjects.frontier_steps import BLUEPRINTS, Steps

EPOCHS = 20


def main() -> int:
    """Measure each network in both precisions, and return 1 where a target was missed."""
    options = parse_arguments()
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("batch_size", "image_size", "images", "repeats")}
    report = TargetReport(
        describe_environment(torch.device("cpu")),
        describe_command(__file__, sys.argv[1:]),
        {**settings, "epochs": EPOCHS},
    )
    with no_garbage_collection():
        for name in options.models:
            for bf16 in (False, True):
                measure(name, bf16, options, report)
                write_targets(report, options.output)
    return int(report.missed)


def measure(name: str, bf16: bool, options: argparse.Namespace, report: TargetReport) -> None:
    """Time one network in one precision."""
    steps = Steps(name, options.batch_size, options.image_size, bf16)
    search = _milliseconds(steps.find)
    calls = (steps.recipe, steps.whole, steps.cached, steps.rest, steps.cached, steps.record)
    for call in calls:
        call()
    turns = list(take_turns([partial(_milliseconds, call) for call in calls], options.repeats))
    recipe, whole, cached, rest, again, record = (list(samples) for samples in zip(*turns, strict=True))
    batches = options.images / options.batch_size
    ours = [search / batches + once + EPOCHS * step for once, step in zip(record, cached, strict=True)]
    label = f"{name}, {'bf16' if bf16 else 'float32'}"
    kept = f"{steps.frontier.bytes_per_image / 1000:.0f} kB per image"
    noise = Paired(cached, again)
    report.add(compared(label, "cached step / the rest by hand on ready tensors", 1.05, Paired(cached, rest), noise))
    fewest = BLUEPRINTS[name].fewest_times_faster[bf16]
    for what, samples, at_most in (
        ("the article's recipe", recipe, 1 / fewest),
        ("ours without a frontier", whole, 1.0),
    ):
        epochs = Paired(ours, [EPOCHS * step for step in samples])
        faster = statistics.median(b / a for a, b in zip(epochs.numerator, epochs.denominator, strict=True))
        remark = f"{faster:.2f} times faster, {kept}"
        report.add(compared(label, f"{EPOCHS} epochs on the frontier / {what}", at_most, epochs, noise, remark=remark))


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return 1000 * (time.process_time() - started)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BLUEPRINTS), default=list(BLUEPRINTS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2000, help="of an epoch; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "frontier")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
