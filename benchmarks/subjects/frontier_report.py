"""What was measured of the frontier: a page to read, a figure, and every sample."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.ratios import TargetReport, target_table
from harness.results import describe, median, table, write_file, write_text
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from subjects.variants import Precision

RECIPE, EXACT = "the article's recipe", "the recipe on what ours trains"
READ = "read and transform"
WHOLE, CACHED, AGAIN, REST = "whole step", "cached step", "cached step again", "rest by hand"
RECORD, FIND = "record", "find"
_PRECISIONS: dict[Precision, str] = {"off": "float32", "bf16": "bf16", "fp16": "fp16"}
_RECIPE_COLOUR = "#b0413e"
_COLOURS: dict[Precision, tuple[str, str]] = {"off": ("#f0c987", "#e0a458"), "bf16": ("#9cc3d9", "#2e6f95")}


def label(what: str, precision: Precision) -> str:
    """Name work, or a network, in one precision."""
    return f"{what}, {_PRECISIONS[precision]}"


def compared_with(other: str, epochs: object, *, reading: bool = False) -> str:
    """Name the ratio of whole runs."""
    return f"{epochs} epochs on the frontier / {other}{', reading counted' if reading else ''}"


@dataclass
class FrontierReport(TargetReport):
    """All that one command measured: milliseconds for each image by network and work, and what is kept by precision.

    Samples at the same place were taken in the same turn; that of `find` is the only one, shared among all images.
    """

    milliseconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    kept: dict[str, dict[Precision, str]] = field(default_factory=dict)
    interrupted: bool = False

    def write(self, stem: Path) -> None:
        """Write `stem`.json with every sample, `stem`.md to read, and the figure."""
        write_text(stem.with_suffix(".json"), json.dumps(asdict(self), indent=1) + "\n")
        write_text(stem.with_suffix(".md"), as_markdown(self, stem.with_suffix(".png").name))
        if self.kept:
            draw(self, stem.with_suffix(".png"))


def as_markdown(report: FrontierReport, figure: str) -> str:
    """Return the report as a page to read."""
    refused = [f"Refused: {entry['model']}, {entry['what']}: {entry['reason']}\n" for entry in report.refused]
    parts = ["# The frontier: what a step on it costs, and 20 epochs of them\n", describe(report)]
    parts += ["**Interrupted: these are the samples taken until then.**\n"] if report.interrupted else []
    parts += [f"![Steps by network, and how many times faster]({figure})\n"] if report.kept else []
    parts += ["## Milliseconds per image\n", milliseconds_table(report), ""]
    return "\n".join(
        [
            *parts,
            "## Ratios\n",
            target_table(report.targets),
            *refused,
            HOW_IT_WAS_TIMED.format(recipe=RECIPE, cached=CACHED, rest=REST, record=RECORD, read=READ),
        ]
    )


def milliseconds_table(report: FrontierReport) -> str:
    """Format the medians, a line for each network and precision."""
    lines = []
    for name, by_precision in report.kept.items():
        taken = report.milliseconds[name]
        for precision, kept in by_precision.items():
            works = [RECIPE, EXACT, *(label(what, precision) for what in (WHOLE, CACHED, REST, RECORD, FIND)), READ]
            times = [f"{median(taken[work]):.2f}" if work in taken else "" for work in works]
            lines.append([label(name, precision), *times, kept.replace("\n", "; ")])
    header = ["", RECIPE, EXACT, "ours, whole", CACHED, REST, RECORD, "find / images", READ, "what is kept"]
    return table(header, lines)


def draw(report: FrontierReport, path: Path) -> None:
    """Draw the cost of a step, and how many times faster 20 epochs are than the article's recipe, beside the target."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    steps, faster = figure.subplots(1, 2)
    draw_steps(steps, report)
    draw_times_faster(faster, report)
    facts = report.environment
    where = facts.get("device_name") or f"{facts['cpu']}, threads: {facts['threads']}"
    figure.suptitle(f"{where}, torch {facts['torch']}, {facts['date']}", fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=110))


def draw_steps(axes: Any, report: FrontierReport) -> None:
    """Draw the milliseconds of each step as bars, by network."""
    bars = [(RECIPE, "the article's recipe, float32", _RECIPE_COLOUR)]
    for precision, colours in _COLOURS.items():
        for what, who, colour in zip((WHOLE, CACHED), ("ours, whole", "on the frontier"), colours, strict=True):
            bars.append((label(what, precision), label(who, precision), colour))
    for place, (work, title, colour) in enumerate(bars):
        heights = [median(taken[work]) if work in taken else 0.0 for taken in _measured(report)]
        _draw_bars(axes, heights, place, len(bars), label=title, color=colour)
    axes.set_ylabel("ms per image, median", fontsize=9)
    _finish(axes, report, "one training step")


def draw_times_faster(axes: Any, report: FrontierReport) -> None:
    """Draw the ratio to the article's recipe as bars, by network, and the target as a line on each."""
    kinds = [(precision, reading) for precision in _COLOURS for reading in (False, True)]
    for place, (precision, reading) in enumerate(kinds):
        what = compared_with(RECIPE, report.settings["epochs"], reading=reading)
        ratios = [_ratio(report, label(name, precision), what) for name in report.kept]
        title = label("reading counted" if reading else "reading left out", precision)
        colour = _COLOURS[precision][0 if reading else 1]
        places = _draw_bars(axes, [measured for measured, _ in ratios], place, len(kinds), label=title, color=colour)
        targets = [target for _, target in ratios]
        ends = [[where + side * 0.4 / len(kinds) for where in places] for side in (-1, 1)]
        axes.hlines(targets, *ends, color="#222222", linewidth=2, label=None if place else "target")
        exact = compared_with(EXACT, report.settings["epochs"], reading=reading)
        marks = [_ratio(report, label(name, precision), exact)[0] or math.nan for name in report.kept]
        axes.plot(places, marks, "D", color="white", markeredgecolor="#222222", label=None if place else EXACT)
    axes.set_ylabel("recipe / on the frontier", fontsize=9)
    _finish(axes, report, f"{report.settings['epochs']} epochs, building counted: times faster than the recipe")


def _measured(report: FrontierReport) -> list[dict[str, list[float]]]:
    return [report.milliseconds[name] for name in report.kept]


def _ratio(report: FrontierReport, model: str, what: str) -> tuple[float, float]:
    """How many times faster, and how many are wanted; zeros where it was not measured."""
    for target in report.targets:
        if (target.model, target.what) == (model, what) and target.ratio is not None:
            return 1 / target.ratio.median, 1 / target.at_most
    return 0.0, 0.0


def _draw_bars(axes: Any, heights: Sequence[float], place: int, of: int, **style: Any) -> list[float]:
    """Draw one bar in each group, with its number on top; gives where."""
    places = [group + 0.84 * ((place + 0.5) / of - 0.5) for group in range(len(heights))]
    bars = axes.bar(places, heights, width=0.8 / of, **style)
    axes.bar_label(bars, [f"{height:.3g}" if height else "" for height in heights], fontsize=7, padding=1)
    return places


def _finish(axes: Any, report: FrontierReport, title: str) -> None:
    axes.set_yscale("log")
    axes.set_ylim(1, 3 * axes.get_ylim()[1])  # with room for the legend
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(range(len(report.kept)), [_in_lines(name) for name in report.kept])
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=7, ncols=3, loc="upper center")
    axes.set_title(title, fontsize=10)


def _in_lines(name: str) -> str:
    """Break a name that is wider than a group of bars."""
    return name.replace("Variation", "\nVariation").replace("_patch", "\n_patch").replace(", ", ",\n")


HOW_IT_WAS_TIMED = f"""\
All the work on a network takes turns in one process, in both precisions. A step is forward, loss, backward and AdamW on
what trains, at a learning rate of 0.

- *{RECIPE}* freezes parameters by words in their names, on the plain network: every module is in train mode, in
  float32. In EfficientNet the word for the head's norm, `bn2`, is also in the name of a norm in each block; these train
  as well, and backward runs through the whole network. *{EXACT}* leaves them frozen.
- *{CACHED}* takes a random batch out of a store of 8 batches in memory, and replays it.
- *{REST}* is the trainable rest, written out for each network, on ready tensors of the batch.
- *{RECORD}* computes what is kept for the batch and writes it into the store; *{FIND}* is timed once.
- *{READ}* decodes JPEGs of 500 x 375 with Pillow and runs timm's evaluation transform.

That the frontier and the rest by hand give the whole network's logits and gradients is proved before anything is timed.
The epochs are put together from these: ours are one search, shared among the images, one recording and a cached step
for each epoch; the others are a whole step for each. Where reading is counted, ours reads each image once and the
recipe reads it in each epoch.

EfficientNet-Lite0's targets were set on what was trained then as its last two layer groups: `blocks.6` and the head.
These are one group today, the row without `2 groups`. With `2 groups`, `blocks.5` trains as well.

On a CPU, milliseconds are CPU time of the process; on a GPU, time between events. What takes less than 150 ms runs
several times back to back.
"""
