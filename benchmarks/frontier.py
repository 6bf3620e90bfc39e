"""Measure what the frontier saves: a cached step vs. the trainable rest alone, 20 epochs vs. the article's recipe.

    python benchmarks/frontier.py --device cpu --threads 1

Whole steps (forward, loss, backward, AdamW) take turns with a pass that records the frontier and with reading JPEGs. 20
epochs are computed from them. On a CPU, CPU time of the process is measured, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from caching.training import time_in_turns
from harness.environment import describe_command, describe_environment, describe_precision, note_end
from harness.options import add_models_option, add_shared_options, batch_size_on, positive, settle_device
from harness.ratios import Paired, Target, compared
from harness.results import reason_of
from harness.timing import Clock, ProcessClock, clock_for, milliseconds_of, no_garbage_collection
from reading.batch import JpegBatch
from subjects.frontier_memory import judge_memory
from subjects.frontier_report import (
    AGAIN,
    CACHED,
    EXACT,
    FIND,
    READ,
    RECIPE,
    RECORD,
    REST,
    WHOLE,
    FrontierReport,
    compared_with,
    label,
)
from subjects.frontier_steps import BLUEPRINTS, FrontierWork, build_partly_frozen, names_take_more, recipe_step
from subjects.variants import Precision, optimizer_name
from targets import has_bf16_instructions

SHORTEST_SAMPLE_MS = 150.0  # shorter work is repeated


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every target; return 0, or 1 if one was missed or not measured, or 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/frontier", batch_size=16)
    add_models_option(parser, [name for name in BLUEPRINTS if name != "test_resnet"])
    parser.add_argument("--images", type=positive, default=2000, metavar="N", help="of an epoch (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=20, metavar="N", help="default: %(default)s")
    parser.set_defaults(image_size=224, repeats=8)
    options = parser.parse_args(given)
    try:
        if unknown := [name for name in options.models if name not in BLUEPRINTS]:
            raise ValueError(f"--models {' '.join(unknown)}: pass some of {', '.join(BLUEPRINTS)}.")
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    options.batch_size = batch_size_on(device, options)
    settings = {name: getattr(options, name) for name in ("batch_size", "image_size", "images", "epochs", "repeats")}
    settings |= {"precision": describe_precision("off", device), "optimizer": optimizer_name(device)}
    report = FrontierReport(describe_environment(device), describe_command("frontier.py", given), settings)
    try:
        with TemporaryDirectory() as folder, no_garbage_collection():
            jpegs = JpegBatch(Path(folder), options.batch_size, options.image_size)
            for name in options.models:
                answer(report, name, partial(measure, report, name, jpegs, options, device))
                report.write(options.output / "frontier")
            answer(report, "peak memory", lambda: [judge_memory(options.images // 5, 2 * options.images)])
    except KeyboardInterrupt:
        report.interrupted = True
        print("interrupted: writing what was measured until then", file=sys.stderr)
    note_end(report.environment, device)
    report.write(options.output / "frontier")
    print(f"written to {options.output}: frontier.json, frontier.md, frontier.png")
    if report.interrupted:
        return 130
    return 1 if report.missed or report.refused else 0


def answer(report: FrontierReport, model: str, measure: Callable[[], Iterable[Target]]) -> None:
    """Add the targets of one question to a report; an error is recorded."""
    try:
        for target in measure():
            report.add(target)
    except Exception as error:  # the other networks are still measured
        report.refuse(model, "all of it", reason_of(error))


def measure(
    report: FrontierReport, name: str, jpegs: JpegBatch, options: argparse.Namespace, device: torch.device
) -> Iterator[Target]:
    """Time all the work on one network, in both precisions, in turns; yield the targets."""
    clock = clock_for(device) if device.type == "cuda" else ProcessClock()
    blueprint = BLUEPRINTS[name]
    sizes = (options.batch_size, options.image_size)
    network = build_partly_frozen(blueprint.network, blueprint.trainable_groups, *sizes, device)
    calls: dict[str, Callable[[], object]] = {RECIPE: recipe_step(network, blueprint.words).run}
    if names_take_more(network, blueprint.words):
        calls[EXACT] = recipe_step(network).run
    found: dict[Precision, FrontierWork] = {}
    for precision in blueprint.times_faster:
        if precision == "bf16" and not has_bf16_instructions(device):
            reason = "no bf16 instructions here: bf16 is emulated, and slower"
            yield Target(label(name, precision), "all of it", 1.0, remark=reason)
            continue
        work = found[precision] = FrontierWork(network, blueprint.rest, precision, clock)
        calls |= {
            label(WHOLE, precision): work.whole.run,
            label(CACHED, precision): work.cached.run,
            label(REST, precision): work.rest.run,
            label(AGAIN, precision): work.cached.run,
            label(RECORD, precision): work.record_and_store,
        }
    calls[READ] = jpegs.read
    runs = {what: max(1, math.ceil(SHORTEST_SAMPLE_MS / least_ms(call, clock))) for what, call in calls.items()}
    taken = report.milliseconds.setdefault(name, {})
    visits = {what: partial(run_several, call, runs[what]) for what, call in calls.items()}
    time_in_turns(visits, options.repeats, clock, taken, title=name)
    for what, samples in taken.items():
        taken[what] = [milliseconds / (options.batch_size * runs[what]) for milliseconds in samples]
    for precision, work in found.items():
        taken[label(FIND, precision)] = [work.find_ms / options.images]
        report.kept.setdefault(name, {})[precision] = str(work.frontier)
        remark = f"{work.bytes_per_image / 1000:.0f} kB per image"
        own = {what: taken[label(what, precision)] for what in (WHOLE, CACHED, REST, AGAIN, RECORD, FIND)}
        own |= {what: taken[what] for what in (RECIPE, READ, EXACT) if what in taken}
        yield from judge(label(name, precision), own, blueprint.times_faster[precision], options.epochs, remark)


def least_ms(call: Callable[[], object], clock: Clock) -> float:
    """Milliseconds of the faster of two calls, the first of which warms up."""
    return min(milliseconds_of(call, clock) for _ in range(2))


def run_several(call: Callable[[], object], runs: int) -> None:
    """Run back to back, like a training loop, without waiting for a GPU in between."""
    for _ in range(runs):
        call()


def judge(
    model: str, taken: Mapping[str, Sequence[float]], fewest: float, epochs: int, remark: str
) -> Iterator[Target]:
    """Compare a cached step with the handwritten rest, and epochs on the frontier with those of other methods."""
    cached, read = taken[CACHED], taken[READ]
    noise = Paired(taken[AGAIN], cached)
    yield compared(model, "cached step / the rest by hand on ready tensors", 1.05, Paired(cached, taken[REST]), noise)
    ours = [taken[FIND][0] + record + epochs * step for record, step in zip(taken[RECORD], cached, strict=True)]
    with_reading = [own + once for own, once in zip(ours, read, strict=True)]
    recipe = [epochs * step for step in taken[RECIPE]]
    recipe_reading = [steps + epochs * once for steps, once in zip(recipe, read, strict=True)]
    whole = [epochs * step for step in taken[WHOLE]]
    others = [
        (RECIPE, False, Paired(ours, recipe), fewest),
        (RECIPE, True, Paired(with_reading, recipe_reading), fewest),
        ("ours without the frontier", False, Paired(ours, whole), 1.0),
    ]
    if EXACT in taken:
        others.append((EXACT, False, Paired(ours, [epochs * step for step in taken[EXACT]]), 1.0))
    for other, reading, samples, wanted in others:
        what = compared_with(other, epochs, reading=reading)
        faster = f"{1 / samples.ratio.median:.2f} times faster, {wanted:g} wanted; {remark}"
        yield compared(model, what, 1 / wanted, samples, noise, remark=faster)


if __name__ == "__main__":
    sys.exit(main())
