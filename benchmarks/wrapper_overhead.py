"""What the wrapper costs: its forward and construction beside bare timm, and its own calls as networks grow.

python benchmarks/wrapper_overhead.py --models resnet18 vit_small_patch16_224
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import timm
import torch
from command_line import add_models_option, add_shared_options, repeats_on, settle_device
from environment import Fact, describe_command, describe_environment
from measure import (
    Clock,
    WallClock,
    clock_for,
    milliseconds_of,
    no_garbage_collection,
    paired_ratio,
    take_turns,
    warm_up,
)
from networks import NUM_CLASSES, check_names, picture_size
from results import describe, spread, table, write_text
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

from backbone_finetune import FineTuneModel

DEFAULT_MODELS = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch16_224", "convnext_atto")
# Families whose members differ in depth, up to the largest that timm has: built without weights, on the meta device.
LADDERS = {
    "ResNet": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnetv2_152x4_bit"),
    "ViT": (
        "vit_base_patch16_224",
        "vit_large_patch16_224",
        "vit_huge_patch14_224",
        "vit_giant_patch14_224",
        "vit_gigantic_patch14_224",
    ),
}
LINEAR_GROWTH = 1.1  # an exponent above 1 by no more than a noisy machine explains


@dataclass
class Comparison:
    """Samples of one piece of work, wrapped and bare, taken in turns; `again` is the bare one once more."""

    model: str
    what: str
    wrapped_ms: list[float]
    bare_ms: list[float]
    again_ms: list[float]


@dataclass(frozen=True)
class CallTime:
    """Milliseconds of one call of the wrapper on one network."""

    family: str
    model: str
    call: str
    parameter_tensors: int
    parameters: int
    milliseconds: float


@dataclass
class OverheadReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    comparisons: list[Comparison] = field(default_factory=list)
    calls: list[CallTime] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; Ctrl-C keeps what was measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/wrapper_overhead")
    add_models_option(parser, DEFAULT_MODELS)
    parser.add_argument("--ladder", nargs="*", choices=list(LADDERS), default=list(LADDERS), help="families to grow")
    options = parser.parse_args(given)
    try:
        check_names(options.models)
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    repeats = repeats_on(device, options)
    batch_size = options.batch_size or 8
    settings: dict[str, Fact] = {"batch_size": batch_size, "image_size": options.image_size, "repeats": repeats}
    report = OverheadReport(describe_environment(device), describe_command("wrapper_overhead.py", given), settings)
    try:
        with no_garbage_collection():
            for name in tqdm(options.models, desc="against timm", disable=None):
                size: int | None = options.image_size
                forward = compare_forward(name, batch_size=batch_size, image_size=size, device=device, repeats=repeats)
                report.comparisons += [forward, compare_construction(name, repeats=repeats)]
            for family in options.ladder:
                for name in tqdm(LADDERS[family], desc=family, disable=None):
                    report.calls += time_calls(family, name)
    except KeyboardInterrupt:
        print("interrupted: writing what was measured until then", file=sys.stderr)
        return 130
    finally:
        write_text(options.output / "wrapper_overhead.json", json.dumps(asdict(report), indent=1) + "\n")
        write_text(options.output / "wrapper_overhead.md", as_markdown(report))
    print(as_markdown(report))
    return 0


def compare_forward(
    name: str, *, batch_size: int, image_size: int | None, device: torch.device, repeats: int
) -> Comparison:
    """Time a forward in eval mode under `no_grad`, where the wrapper's share is largest, on the same weights."""
    size, arguments = picture_size(name, image_size)
    bare = timm.create_model(name, num_classes=NUM_CLASSES, **arguments).to(device).eval()
    wrapped = FineTuneModel.from_timm(copy.deepcopy(bare)).to(device).eval()
    images = torch.randn(batch_size, *size, device=device)

    def forward(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(images)  # type: ignore[no-any-return]

    torch.testing.assert_close(forward(wrapped), forward(bare))  # the same work, or there is nothing to compare
    return compare(name, "forward", partial(forward, wrapped), partial(forward, bare), clock_for(device), repeats)


def compare_construction(name: str, *, repeats: int) -> Comparison:
    """Time `FineTuneModel.from_timm` beside `timm.create_model`, random weights and all."""
    wrapped = partial(FineTuneModel.from_timm, name, num_classes=NUM_CLASSES)
    bare = partial(timm.create_model, name, num_classes=NUM_CLASSES)
    return compare(name, "construction", wrapped, bare, WallClock(), repeats)


def compare(  # noqa: PLR0917  all that a comparison is made of
    model: str, what: str, wrapped: Callable[[], object], bare: Callable[[], object], clock: Clock, repeats: int
) -> Comparison:
    """Warm up, then time wrapped, bare and bare again in turns."""
    calls = (wrapped, bare, bare)
    for call in calls:
        warm_up(call, clock)
    turns = list(take_turns([partial(milliseconds_of, call, clock) for call in calls], repeats))
    samples = [list(column) for column in zip(*turns, strict=True)]
    return Comparison(model, what, *samples)


def time_calls(family: str, name: str) -> list[CallTime]:
    """Time the wrapper's own calls on a network without weights, which they do not touch."""
    with torch.device("meta"):
        model = FineTuneModel.from_timm(name, num_classes=NUM_CLASSES)
    calls: dict[str, Callable[[], object]] = {
        "freeze_backbone()": model.freeze_backbone,
        "unfreeze_backbone()": model.unfreeze_backbone,
        "param_groups(lr)": partial(model.unfreeze_backbone().param_groups, lr=1e-3),
        "param_groups(lr, layer_decay)": partial(model.param_groups, lr=1e-3, layer_decay=0.75),
        "train()": model.train,
    }
    tensors = list(model.parameters())
    times = []
    for label, call in calls.items():
        model.unfreeze_backbone()
        measured = Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=0.3)
        count = sum(tensor.numel() for tensor in tensors)
        times.append(CallTime(family, name, label, len(tensors), count, measured.median * 1e3))
    return times


def growth(times: Sequence[CallTime]) -> float:
    """Exponent by which a call's time grows with the number of parameter tensors: 1 is linear."""
    slope, _ = statistics.linear_regression(
        [math.log(time.parameter_tensors) for time in times], [math.log(time.milliseconds) for time in times]
    )
    return slope


def as_markdown(report: OverheadReport) -> str:
    """Give the report as a page to read."""
    lines = []
    for comparison in report.comparisons:
        lines.append([f"{comparison.model}: {comparison.what}", spread(comparison.wrapped_ms)])
        lines[-1] += [spread(comparison.bare_ms), str(paired_ratio(comparison.wrapped_ms, comparison.bare_ms))]
        lines[-1].append(str(paired_ratio(comparison.again_ms, comparison.bare_ms)))
    header = ["", "wrapped ms", "bare timm ms", "wrapped / bare", "A/A: bare / bare"]
    parts = ["# What the wrapper costs\n", describe(report), "## Beside bare timm\n", table(header, lines), ""]
    for family in dict.fromkeys(time.family for time in report.calls):
        parts += [f"## Its own calls: {family}, on the meta device\n", _calls_table(report, family), ""]
    return "\n".join(parts)


def _calls_table(report: OverheadReport, family: str) -> str:
    times = [time for time in report.calls if time.family == family]
    calls = list(dict.fromkeys(time.call for time in times))
    lines = []
    for name in dict.fromkeys(time.model for time in times):
        own = {time.call: time for time in times if time.model == name}
        first = next(iter(own.values()))
        lines.append([name, str(first.parameter_tensors), f"{first.parameters / 1e6:,.0f} M"])
        lines[-1] += [f"{own[call].milliseconds:.3g} ms" for call in calls]
    if len(lines) > 1:
        exponents = [growth([time for time in times if time.call == call]) for call in calls]
        verdicts = [f"{exponent:.2f}{'' if exponent <= LINEAR_GROWTH else ' (not linear)'}" for exponent in exponents]
        lines.append(["growth exponent (1 = linear)", "", "", *verdicts])
    return table(["", "tensors", "parameters", *calls], lines)


if __name__ == "__main__":
    sys.exit(main())
