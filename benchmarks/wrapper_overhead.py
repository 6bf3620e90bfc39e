"""Measure the cost of the wrapper: forward and construction vs. bare timm, and its own calls for growing networks.

python benchmarks/wrapper_overhead.py --models resnet18 vit_small_patch16_224
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import timm
import torch
from harness.call_growth import LADDERS, CallTime, calls_table, time_calls
from harness.cuda import Fact
from harness.environment import describe_command, describe_environment, describe_precision, note_end
from harness.options import add_models_option, add_shared_options, batch_size_on, repeats_on, settle_device
from harness.results import describe, spread, table, write_text
from harness.timing import (
    Clock,
    EventClock,
    WallClock,
    clock_for,
    least_warm_up,
    milliseconds_of,
    no_garbage_collection,
    paired_ratio,
    take_turns,
    warm_up,
)
from subjects.networks import NUM_CLASSES, check_names, input_size_of
from torch import Tensor, nn
from tqdm import tqdm

from backbone_finetune import FineTuneModel

DEFAULT_MODELS = ("resnet18", "tf_efficientnet_lite0", "vit_small_patch16_224", "convnext_atto")


@dataclass
class Comparison:
    """Samples of the same work, wrapped and bare, taken in turns; `again` is a second measurement of bare."""

    model: str
    what: str
    wrapped_ms: list[float]
    bare_ms: list[float]
    again_ms: list[float]


@dataclass
class OverheadReport:
    """All that one command measured."""

    environment: dict[str, Fact]
    command: str
    settings: dict[str, Fact]
    comparisons: list[Comparison] = field(default_factory=list)
    calls: list[CallTime] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None, *, ladders: Mapping[str, Sequence[str]] = LADDERS) -> int:
    """Measure and write; Ctrl-C keeps what was measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shared_options(parser, output="runs/wrapper_overhead")
    add_models_option(parser, DEFAULT_MODELS)
    parser.add_argument("--ladder", nargs="*", choices=list(ladders), default=list(ladders), help="families to grow")
    options = parser.parse_args(given)
    try:
        check_names(options.models)
        device = settle_device(options)
    except ValueError as error:
        parser.error(str(error))
    repeats = repeats_on(device, options)
    batch_size = batch_size_on(device, options)
    settings: dict[str, Fact] = {"batch_size": batch_size, "image_size": options.image_size, "repeats": repeats}
    settings["precision"] = describe_precision("off", device)
    report = OverheadReport(describe_environment(device), describe_command("wrapper_overhead.py", given), settings)
    try:
        with no_garbage_collection():
            for name in tqdm(options.models, desc="against timm", disable=None):
                size: int | None = options.image_size
                forward = compare_forward(name, batch_size=batch_size, image_size=size, device=device, repeats=repeats)
                report.comparisons += [forward, compare_construction(name, repeats=repeats)]
            for family in options.ladder:
                print(f"{family}: the wrapper's own calls", file=sys.stderr)
                time_calls(family, ladders[family], repeats, report.calls)
    except KeyboardInterrupt:
        print("interrupted: writing what was measured until then", file=sys.stderr)
        return 130
    finally:
        note_end(report.environment, device)
        write_text(options.output / "wrapper_overhead.json", json.dumps(asdict(report), indent=1) + "\n")
        write_text(options.output / "wrapper_overhead.md", as_markdown(report))
    print(as_markdown(report))
    print(f"written to {options.output}: wrapper_overhead.json, wrapper_overhead.md")
    return 0


def compare_forward(
    name: str,
    *,
    batch_size: int,
    image_size: int | None,
    device: torch.device,
    repeats: int,
    wrap: Callable[[nn.Module], nn.Module] = FineTuneModel.from_timm,
) -> Comparison:
    """Time a forward in eval mode under `no_grad`, where the wrapper's share is largest, on the same weights."""
    size, arguments = input_size_of(name, image_size)
    bare = timm.create_model(name, num_classes=NUM_CLASSES, **arguments).to(device).eval()
    wrapped = wrap(copy.deepcopy(bare)).to(device).eval()
    images = torch.randn(batch_size, *size, device=device)

    def forward(network: nn.Module) -> Tensor:
        with torch.no_grad():
            return network(images)  # type: ignore[no-any-return]

    torch.testing.assert_close(forward(wrapped), forward(bare))  # otherwise the comparison is meaningless
    return compare(name, "forward", partial(forward, wrapped), partial(forward, bare), clock_for(device), repeats)


def compare_construction(name: str, *, repeats: int) -> Comparison:
    """Compare the times of `FineTuneModel.from_timm` and `timm.create_model`, including random weights."""
    wrapped = partial(FineTuneModel.from_timm, name, num_classes=NUM_CLASSES)
    bare = partial(timm.create_model, name, num_classes=NUM_CLASSES)
    return compare(name, "construction", wrapped, bare, WallClock(), repeats)


def compare(  # noqa: PLR0917  all that a comparison is made of
    model: str, what: str, wrapped: Callable[[], object], bare: Callable[[], object], clock: Clock, repeats: int
) -> Comparison:
    """Warm up, then time wrapped, bare and bare again in turns."""
    calls = (wrapped, bare, bare)
    least_ms = least_warm_up(torch.device("cuda" if isinstance(clock, EventClock) else "cpu"))
    for call in calls:
        warm_up(call, clock, at_least_ms=least_ms)
    turns = list(take_turns([partial(milliseconds_of, call, clock) for call in calls], repeats))
    samples = [list(column) for column in zip(*turns, strict=True)]
    return Comparison(model, what, *samples)


def as_markdown(report: OverheadReport) -> str:
    """Return the report as a page to read."""
    lines = []
    for comparison in report.comparisons:
        lines.append([f"{comparison.model}: {comparison.what}", spread(comparison.wrapped_ms)])
        lines[-1] += [spread(comparison.bare_ms), str(paired_ratio(comparison.wrapped_ms, comparison.bare_ms))]
        lines[-1].append(str(paired_ratio(comparison.again_ms, comparison.bare_ms)))
    header = ["", "wrapped ms", "bare timm ms", "wrapped / bare", "A/A: bare / bare"]
    parts = ["# What the wrapper costs\n", describe(report), "## Beside bare timm\n", table(header, lines), ""]
    timed = [time for time in report.calls if time.milliseconds]
    for family in dict.fromkeys(time.family for time in timed):
        own = [time for time in timed if time.family == family]
        parts += [f"## Its own calls: {family}, on the meta device\n", calls_table(own), ""]
    if timed:
        parts.append(_HOW_IT_GROWS)
    return "\n".join(parts)


_HOW_IT_GROWS = """\
Growth is the exponent over a family's parameter tensors. The functions that a call calls, of Python and of C, are
counted, and say how its work grows; its time has the processor's caches in it as well, which large networks outgrow.
"""


if __name__ == "__main__":
    sys.exit(main())
