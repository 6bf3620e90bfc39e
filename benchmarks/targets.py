"""Measure the project's own targets: ratios from one run, each with its upper limit.

python benchmarks/targets.py --threads 1
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from backward_time import Measured, Setup, measure_at_batch
from harness import cuda
from harness.cuda import Fact
from harness.environment import describe_command, describe_environment, describe_precision, note_end
from harness.options import add_models_option, add_shared_options, batch_size_on, repeats_on, settle_device
from harness.ratios import Paired, Target, TargetReport, compared, write_targets
from harness.results import Row, reason_of
from harness.timing import (
    Interval,
    clock_for,
    least_warm_up,
    loop_steps_on,
    milliseconds_of,
    no_garbage_collection,
    take_turns,
    time_step,
    warm_up,
)
from peers import Conditions, compare_methods
from subjects.equality import prove_equal
from subjects.networks import NUM_CLASSES, build_network, check_names, input_size_of
from subjects.peer_methods import METHODS, Method, make_blueprint
from subjects.peer_report import PeerRow
from subjects.variants import Precision, Trainer, Variant, count_saved, optimizer_name, variants_of
from wrapper_overhead import compare_forward

DEFAULT_MODELS = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch16_224", "convnext_atto")


def main(arguments: Sequence[str] | None = None, *, ask: Ask | None = None) -> int:
    """Measure every target; return 0, or 1 if one was missed or not measured, or 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/targets", batch_size_on_cuda=256)
    add_models_option(parser, DEFAULT_MODELS)
    options = parser.parse_args(given)
    try:
        check_names(options.models)
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    setup = Setup(
        device=device,
        clock=clock_for(device),
        batch_size=batch_size_on(device, options),
        image_size=options.image_size,
        precision="off",
        channels_last=False,
        compiled=False,
        repeats=repeats_on(device, options),
        loop_steps=loop_steps_on(device),
    )
    settings: dict[str, Fact] = {"batch_size": setup.batch_size, "image_size": setup.image_size}
    settings |= {"repeats": setup.repeats, "precision": describe_precision("off", device)}
    settings["optimizer"] = optimizer_name(device)
    report = TargetReport(describe_environment(device), describe_command("targets.py", given), settings)
    interrupted = False
    try:
        with no_garbage_collection():
            for question in (ask or list_questions)(options.models, setup):
                answer(question, report, lambda: write_targets(report, options.output / "targets"))
    except KeyboardInterrupt:
        interrupted = True
    note_end(report.environment, device)
    write_targets(report, options.output / "targets")
    print(f"written to {options.output}: targets.json, targets.md")
    if interrupted:
        return 130
    return 1 if report.missed or report.refused else 0


@dataclass(frozen=True)
class Question:
    """A question about one model; `measure` returns one or more targets."""

    model: str
    what: str
    measure: Callable[[], Iterable[Target]]


Ask = Callable[[Sequence[str], Setup], Iterable[Question]]


def list_questions(models: Sequence[str], setup: Setup) -> Iterator[Question]:
    """Yield the questions in the order in which they are measured."""
    for name in models:
        yield Question(name, "against the limit", partial(against_the_limit, name, setup))
        yield Question(name, "the wrapper's forward", partial(wrapper_forward, name, setup))
    if "tf_efficientnet_lite0" in models:
        name, limits = "tf_efficientnet_lite0", {"the article's recipe": 0.70}
        yield Question(name, "against other methods", partial(against_methods, name, limits, setup))
    if "resnet18" in models:
        limits = {"Lightning freeze, train_bn=True": 0.60, "fastai Learner.freeze": 0.60}
        yield Question("resnet18", "against other methods", partial(against_methods, "resnet18", limits, setup))
        yield Question("resnet18", "in half precision", partial(half_precision, "resnet18", setup))
    for name in models:
        yield Question(name, "depth by depth", partial(falls_with_depth, name, setup))


def answer(question: Question, report: TargetReport, save: Callable[[], object]) -> None:
    """Add a question's targets to a report and save it after each; an error is recorded."""
    try:
        for target in question.measure():
            report.add(target)
            save()
    except Exception as error:  # the error of one question is recorded, and the others are measured
        report.refuse(question.model, question.what, reason_of(error))
        save()


def against_the_limit(name: str, setup: Setup) -> Iterator[Target]:
    """Compare the frozen model with the bare head on ready features: backward, step and bytes."""
    network = build_network(name, batch_size=setup.batch_size, image_size=setup.image_size, device=setup.device)
    *_, frozen, limit = variants_of(network)
    for variant in (frozen, limit):
        prove_equal(variant, network)
    own, bare, again = time_variants([frozen, limit, frozen], setup, Trainer(network))
    saved = [count_saved(variant, network) for variant in (frozen, limit)]
    yield compared(
        name,
        "frozen backward / bare head's backward",
        1.05,
        Paired(own.backward_ms, bare.backward_ms),
        Paired(again.backward_ms, own.backward_ms),
        remark="launch-bound" if "backward" in own.launch_bound else "",
    )
    yield compared(
        name,
        "frozen step / (no_grad eval forward + bare head's step)",
        1.02,
        Paired(own.whole_step_ms, bare.whole_step_ms),
        Paired(again.whole_step_ms, own.whole_step_ms),
    )
    ratio = saved[0] / saved[1]
    remark = f"{saved[0]:,} of {saved[1]:,} bytes"
    yield Target(
        name, "bytes saved for backward, frozen / bare head", 1.0, Interval(ratio, ratio, ratio), remark=remark
    )


def time_variants(variants: Sequence[Variant], setup: Setup, trainer: Trainer) -> list[PeerRow]:
    """Time variants in turns."""
    steps = [trainer.step_of(variant) for variant in variants]
    for step in steps:
        step.enter()
        warm_up(step.run, setup.clock, at_least_ms=least_warm_up(setup.device))
    columns = [PeerRow("", variant.label, None) for variant in variants]
    visits = [partial(time_step, step, setup.clock, setup.loop_steps) for step in steps]
    for turn in take_turns(visits, setup.repeats):
        for column, times in zip(columns, turn, strict=True):
            column.add(times)
    return columns


def wrapper_forward(name: str, setup: Setup) -> Iterator[Target]:
    """Compare the wrapped forward with the bare timm model's."""
    comparison = compare_forward(
        name,
        batch_size=setup.batch_size,
        image_size=setup.image_size,
        device=setup.device,
        repeats=setup.repeats,
    )
    samples, noise = (Paired(ms, comparison.bare_ms) for ms in (comparison.wrapped_ms, comparison.again_ms))
    yield compared(name, "wrapped forward / bare timm forward", 1.01, samples, noise)


def against_methods(
    name: str, limits: dict[str, float], setup: Setup, methods: Sequence[Method] = METHODS
) -> Iterator[Target]:
    """Compare our frozen step with that of other ways to freeze."""
    size, arguments = input_size_of(name, setup.image_size)
    blueprint = make_blueprint(name, NUM_CLASSES, size[-1], arguments)
    batch = Conditions(setup.device, setup.batch_size, setup.image_size, setup.repeats).batch(setup.batch_size, size)
    rows: list[PeerRow] = []
    asked = [method for method in methods if method.label in (*limits, "ours")]
    compare_methods(blueprint, batch, asked, setup.repeats, rows)
    by_label = {row.method: row for row in rows}
    if by_label["ours"].error is not None:
        raise RuntimeError(f"ours: {by_label['ours'].error}")
    for label, at_most in limits.items():
        what = f"step, ours / {label}"
        other = by_label[label]
        if other.error is not None:
            yield Target(name, what, at_most, remark=other.error)
        else:
            yield compared(name, what, at_most, Paired(by_label["ours"].whole_step_ms, other.whole_step_ms))


def half_precision(name: str, setup: Setup) -> Iterator[Target]:
    """Compare a frozen step in bf16 and channels last with one in float32."""
    what = f"frozen step, bf16 and channels last / {describe_precision('off', setup.device)}"
    if not has_bf16_instructions(setup.device):
        yield Target(name, what, 0.5, remark="this processor has no bf16 instructions: bf16 is emulated, and slower")
        return
    samples: list[Callable[[], float]] = []
    choices: tuple[tuple[Precision, torch.memory_format], ...] = (
        ("bf16", torch.channels_last),
        ("off", torch.contiguous_format),
    )
    for precision, memory_format in choices:
        network = build_network(
            name,
            batch_size=setup.batch_size,
            image_size=setup.image_size,
            device=setup.device,
            memory_format=memory_format,
        )
        frozen = variants_of(network)[-2]
        prove_equal(frozen, network, precision)
        step = Trainer(network, precision).step_of(frozen)
        warm_up(step.run, setup.clock, at_least_ms=least_warm_up(setup.device))
        samples.append(partial(milliseconds_of, step.run, setup.clock))
    turns = list(take_turns(samples, setup.repeats))
    yield compared(name, what, 0.5, Paired([turn[0] for turn in turns], [turn[1] for turn in turns]))


def has_bf16_instructions(device: torch.device) -> bool:
    """Return whether the device has bf16 instructions, according to torch."""
    if device.type == "cuda":
        return cuda.has_bf16()
    # torch has no public function for this.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def falls_with_depth(name: str, setup: Setup) -> Iterator[Target]:
    """Compare the backward of each depth of freezing with the next shallower one: none may cost more."""
    measured = measure_at_batch(name, setup, setup.batch_size)
    if measured.interrupted:
        raise KeyboardInterrupt
    yield from compare_depths(name, measured)


def compare_depths(name: str, measured: Measured) -> Iterator[Target]:
    """Compare the measured backward of each depth with the next shallower one."""
    rows = [row for row in measured.rows if row.trainable_groups is not None]
    noise = next(
        Paired(again.backward_ms, rows[0].backward_ms) for again in measured.noise if again.variant == "unfrozen"
    )
    for shallower, deeper in itertools.pairwise(rows):
        what = f"backward, top {deeper.trainable_groups} groups train / top {shallower.trainable_groups}"
        # At most 1, and no noise on top: that a ratio's whole interval must be above makes allowance for it already.
        samples = Paired(deeper.backward_ms, shallower.backward_ms)
        yield compared(name, what, 1.0, samples, noise, remark=predicted(deeper, shallower))


def predicted(deeper: Row, shallower: Row) -> str:
    """Describe what the floating point operations of the two backwards let expect."""
    if not deeper.backward_flops or not shallower.backward_flops:
        return ""
    return f"FLOPs predict {deeper.backward_flops / shallower.backward_flops:.3f}"


if __name__ == "__main__":
    sys.exit(main())
