"""Measure what freezing saves: backward, whole step and memory, for each depth of freezing, compared with the limit.

python benchmarks/backward_time.py --device cuda --models resnet50
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from harness.cuda import Fact, allocation_retries
from harness.environment import describe_command, describe_precision, note_end
from harness.memory import at_largest_batch, count_saved_bytes, is_out_of_memory, peak_memory
from harness.options import (
    add_models_option,
    add_precision_options,
    add_shared_options,
    batch_size_on,
    repeats_on,
    settle_device,
)
from harness.plots import draw_report
from harness.results import Report, Row, device_table, model_table, reason_of, start_report, write_report
from harness.timing import (
    Clock,
    StepTimes,
    TrainingStep,
    clock_for,
    least_warm_up,
    loop_steps_on,
    no_garbage_collection,
    resolve_device,
    take_turns,
    time_step,
    warm_up,
)
from subjects.equality import prove_equal
from subjects.networks import ARTICLE_NETWORKS, Network, build_network, check_names
from subjects.variants import (
    Precision,
    Trainer,
    Variant,
    count_backward_flops,
    optimizer_name,
    variants_of,
)
from tqdm import tqdm

DEFAULT_MODELS = (
    "ConvModel",
    "PretrainedResNet",
    "resnet50",
    "tf_efficientnet_lite0",
    "convnext_tiny",
    "vit_small_patch16_224",
)


@dataclass(frozen=True)
class Setup:
    """The settings of a measurement, the same for all models of a run."""

    device: torch.device
    clock: Clock
    batch_size: int
    image_size: int | None
    precision: Precision
    channels_last: bool
    compiled: bool
    repeats: int
    loop_steps: int = 0
    build_network: Callable[..., Network] = build_network

    def build(self, name: str, batch_size: int) -> Network:
        """Build a network as it is measured."""
        return self.build_network(
            name,
            batch_size=batch_size,
            image_size=self.image_size,
            device=self.device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
        )


def main(
    arguments: Sequence[str] | None = None,
    *,
    build: Callable[..., Network] = build_network,
    clock: Clock | None = None,
) -> int:
    """Measure, and return 0; 1 where a model or a variant was refused, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(given)
    try:
        check_names(options.models, beside_timm=ARTICLE_NETWORKS)
        setup = prepare(options, build, clock)
    except ValueError as error:
        parser.error(str(error))
    settings: dict[str, Fact] = {"amp": setup.precision, "channels_last": setup.channels_last}
    settings |= {"precision": describe_precision(setup.precision, setup.device), "compile": setup.compiled}
    settings |= {"flush_l2": options.flush_l2, "optimizer": optimizer_name(setup.device)}
    report = start_report(setup.device, describe_command("backward_time.py", given), settings)
    try:
        for name in options.models:
            measure_model(name, setup, report)
            note_end(report.environment, setup.device)
            save(report, options.output)
            if name in report.models():
                print(f"\n{name}\n{model_table(report, name)}\n", flush=True)
            if report.interrupted:
                break
        if setup.loop_steps and not report.interrupted:
            # Last, because the profiler slows down later kernel launches.
            for name in report.models():
                count_kernels(name, setup, report)
                save(report, options.output)
                print(f"\n{name}\n{device_table(report, name)}\n", flush=True)
    except KeyboardInterrupt:
        report.interrupted = True
        save(report, options.output)
    if report.interrupted:
        print(f"interrupted: what was measured until then is in {options.output}", file=sys.stderr)
        return 130
    print(f"written to {options.output}: backward_time.json, .csv, .md{', .png' if report.rows else ''}")
    return 1 if report.refused else 0


def make_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/backward_time", batch_size_on_cuda=64)
    add_models_option(parser, DEFAULT_MODELS)
    add_precision_options(parser)
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--flush-l2", action="store_true", help="empty a GPU's second-level cache before each clock")
    return parser


def prepare(options: argparse.Namespace, build: Callable[..., Network], clock: Clock | None) -> Setup:
    """Set everything that must be set before the first measurement."""
    clock = clock or clock_for(resolve_device(options.device), flush_l2=options.flush_l2)
    device = settle_device(options)
    if options.compile:
        # One graph for each depth of freezing: at dynamo's default limit a deep network would fall back to eager.
        torch._dynamo.config.recompile_limit = 256
    return Setup(
        device=device,
        clock=clock,
        batch_size=batch_size_on(device, options),
        image_size=options.image_size,
        precision=options.amp,
        channels_last=options.channels_last,
        compiled=options.compile,
        repeats=repeats_on(device, options),
        loop_steps=loop_steps_on(device),
        build_network=build,
    )


def save(report: Report, folder: Path) -> None:
    """Write all files of a report, with a plot if there are rows."""
    write_report(report, folder / "backward_time")
    if report.rows:
        draw_report(report, folder / "backward_time.png")


def measure_model(name: str, setup: Setup, report: Report) -> None:
    """Add one model's rows to a report, at the largest batch that fits; record a model that cannot run as refused."""
    tried = [setup.batch_size]

    def measure(batch_size: int) -> Measured:
        tried.append(batch_size)
        return measure_at_batch(name, setup, batch_size)

    try:
        added = at_largest_batch(measure, setup.batch_size, lambda text: tqdm.write(f"{name}: {text}"))
    except Exception as error:  # the error of one network is recorded, and the others are measured
        added = Measured([], [], [])
        added.refuse(name, "all", f"{reason_of(error)} (batch size {tried[-1]})")
    report.rows += added.rows
    report.noise += added.noise
    report.refused += added.refused
    report.interrupted = added.interrupted


@dataclass
class Measured:
    """What one model adds to a report."""

    rows: list[Row]
    noise: list[Row]
    refused: list[dict[str, Fact]]
    interrupted: bool = False

    def refuse(self, model: str, variant: str, reason: str) -> None:
        """Record and print what cannot be measured."""
        tqdm.write(f"{model}, {variant}: refused, no row: {reason}")
        self.refused.append({"model": model, "variant": variant, "reason": reason})


def measure_at_batch(name: str, setup: Setup, batch_size: int) -> Measured:
    """Check and time all variants of a model; on Ctrl-C keep complete passes."""
    network = setup.build(name, batch_size)
    measured = Measured([], [], [])
    proved: list[tuple[Variant, Row]] = []
    variants = variants_of(network, compiled=setup.compiled)
    for variant in tqdm(variants, desc=f"{name}: checks", leave=False, disable=None):
        row = check(variant, network, setup, measured)
        if row is not None:
            proved.append((variant, row))
    # The first and last variant are measured twice in each pass: the difference is noise.
    again = [
        (variant, inspect(variant, network, setup)) for variant, _ in proved if variant.kind in ("unfrozen", "frozen")
    ]
    timed = proved + again
    trainer = Trainer(network, setup.precision)
    steps = [trainer.step_of(variant) for variant, _ in timed]
    try:
        with (
            no_garbage_collection(),
            tqdm(total=setup.repeats * len(steps), desc=name, leave=False, disable=None) as bar,
        ):
            for step in steps:
                bar.set_postfix_str("warming up")
                settle(step, setup)
            bar.set_postfix_str("")
            visits = [partial(visit, step, setup, bar) for step in steps]
            retries = allocation_retries(setup.device)
            for times in take_turns(visits, setup.repeats):
                for (_, row), taken in zip(timed, times, strict=True):
                    row.add(taken)
            retries = allocation_retries(setup.device) - retries
            for _, row in proved:
                row.allocation_retries = retries
    except KeyboardInterrupt:
        measured.interrupted = True
    measured.rows = [row for _, row in proved if row.step_ms]
    measured.noise = [row for _, row in again if row.step_ms]
    return measured


def count_kernels(name: str, setup: Setup, report: Report) -> None:
    """Add kernel counts to a model's rows; an error leaves the rows unchanged."""
    rows = {(row.variant, row.trainable_groups): row for row in report.rows_of(name)}
    try:
        network = setup.build(name, report.rows_of(name)[0].batch_size)
        trainer = Trainer(network, setup.precision)
        for variant in variants_of(network, compiled=setup.compiled):
            row = rows.get((variant.kind, variant.trainable_groups))
            if row is not None:
                step = trainer.step_of(variant)
                step.run()  # without cuDNN's search for algorithms
                row.count_kernels(step, setup.device)
    except Exception as error:  # the measured rows are more important than this count
        tqdm.write(f"{name}: kernels were not counted: {reason_of(error)}")


def check(variant: Variant, network: Network, setup: Setup, measured: Measured) -> Row | None:
    """Check a variant and return its row; return None and record it as refused if it is wrong or cannot run."""
    try:
        prove_equal(variant, network, setup.precision)
        return inspect(variant, network, setup)
    except Exception as error:  # e.g. a trainable BatchNorm needs two images; frozen variants may run
        if is_out_of_memory(error):
            raise
        measured.refuse(network.name, variant.label, reason_of(error))
        return None


def inspect(variant: Variant, network: Network, setup: Setup) -> Row:
    """Return a row with everything that is not timed: bytes, parameters, floating-point operations."""
    variant.enter()
    trainer = Trainer(network, setup.precision)
    step = trainer.step_of(variant)
    step.run()  # creates the optimizer's moments, which are part of the peak of the second step
    parameters = list(network.model.parameters())
    peak = peak_memory(step.run, setup.device)
    step.clear_gradients()
    saved = count_saved_bytes(step.forward, parameters)
    return Row(
        model=network.name,
        variant=variant.kind,
        trainable_groups=variant.trainable_groups,
        batch_size=len(network.images),
        image_size=network.images.shape[-1],
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        saved_bytes=saved,
        peak_bytes=None if peak is None else peak.allocated,
        peak_before_bytes=None if peak is None else peak.before,
        peak_reserved_bytes=None if peak is None else peak.reserved,
        # FlopCounterMode counts single operators, which a compiled graph does not have.
        backward_flops=None if setup.compiled else count_backward_flops(partial(trainer.loss, variant)),
    )


def settle(step: TrainingStep, setup: Setup) -> None:
    """Warm a variant up until its whole step no longer gets faster."""
    step.enter()
    warm_up(step.run, setup.clock, at_least_ms=least_warm_up(setup.device))
    step.clear_gradients()


def visit(step: TrainingStep, setup: Setup, bar: tqdm[NoReturn]) -> StepTimes:
    """Take one sample of a variant, and update the progress bar."""
    times = time_step(step, setup.clock, setup.loop_steps)
    bar.update()
    return times


if __name__ == "__main__":
    sys.exit(main())
