"""Plots of what running a frozen backbone once saves, and of what is learnt in the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caching.training import PEERS
from caching.transfer import PAIRS, Outcome
from matplotlib.figure import Figure

from harness.cuda import Fact
from harness.results import median, write_file

_OURS, _THEIRS, _LIMIT = "#2e6f95", "#b0413e", "#222222"


def draw_cache(
    milliseconds: Mapping[str, Sequence[float]],
    outcomes: Sequence[Outcome],
    settings: Mapping[str, Fact],
    environment: Mapping[str, Fact],
    path: Path,
) -> None:
    """Draw whole runs beside one pass of the backbone, many heads beside one by one, and accuracies by split."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    runs, heads, accuracies = figure.subplots(1, 3, width_ratios=(1.3, 1, 1.2))
    epochs = settings["epochs"]
    assert isinstance(epochs, int)
    draw_runs(runs, milliseconds, epochs)
    draw_heads(heads, milliseconds, epochs)
    draw_accuracies(accuracies, outcomes)
    where = (
        f"{environment['cpu']}, {environment['threads']} threads"
        if environment.get("device") == "cpu"
        else (environment.get("device_name"))
    )
    figure.suptitle(f"{settings['model']}: {where}, torch {environment['torch']}, {environment['date']}", fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=110))


def draw_runs(axes: Any, milliseconds: Mapping[str, Sequence[float]], epochs: int) -> None:
    """Draw the seconds of whole runs, with one pass of the backbone, the limit, as a line."""
    bars = {label: median(taken) for label, taken in milliseconds.items() if label.startswith("ours, ") and taken}
    bars |= {label: epochs * median(milliseconds[label]) for label in PEERS if milliseconds.get(label)}
    _draw_bars(axes, bars)
    passes = [label for label, taken in milliseconds.items() if label.startswith("one pass, ") and taken]
    for label, style in zip(passes, ("--", ":"), strict=False):
        axes.axhline(median(milliseconds[label]) / 1e3, color=_LIMIT, linestyle=style, label=label)
    if passes:
        axes.legend(fontsize=8)
    axes.set_title(f"{epochs} epochs above a frozen backbone", fontsize=10)


def draw_heads(axes: Any, milliseconds: Mapping[str, Sequence[float]], epochs: int) -> None:
    """Draw the seconds of 32 heads: as one, one by one, and (32 times the one measured) as whole runs."""
    names = {"heads together": "together", "heads one by one": "one by one"}
    bars = {name: median(milliseconds[label]) for label, name in names.items() if milliseconds.get(label)}
    if milliseconds.get("the article's recipe"):
        bars["32 x the recipe"] = 32 * epochs * median(milliseconds["the article's recipe"])
    _draw_bars(axes, bars, ours=("together",))
    axes.set_title("32 heads on one cache", fontsize=10)


def draw_accuracies(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Draw the test accuracy of each method, a dot for each split."""
    methods = [method for pair in PAIRS for method in pair]
    for position, method in enumerate(methods):
        own = [outcome.accuracy for outcome in outcomes if outcome.method == method]
        axes.plot([position] * len(own), own, "o", color=_THEIRS if position % 2 else _OURS, alpha=0.7)
        if own:
            axes.hlines(sum(own) / len(own), position - 0.25, position + 0.25, color=_LIMIT)
    axes.set_xticks(range(len(methods)), [method.replace(" on ", "\non ").replace(": ", ":\n") for method in methods])
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("test accuracy, ten classes of clipart", fontsize=9)
    axes.set_title("what is learnt (dots: splits, line: mean)", fontsize=10)


def _draw_bars(axes: Any, bars: Mapping[str, float], ours: Sequence[str] = ()) -> None:
    """Draw milliseconds as seconds, with the number on each bar; log scale, as they are far apart."""
    colours = [_OURS if label in ours or label.startswith("ours") else _THEIRS for label in bars]
    drawn = axes.bar(range(len(bars)), [elapsed / 1e3 for elapsed in bars.values()], color=colours)
    axes.bar_label(drawn, [f"{elapsed / 1e3:,.3g} s" for elapsed in bars.values()], fontsize=8)
    axes.set_xticks(range(len(bars)), [label.replace(" ", "\n") for label in bars])
    axes.tick_params(axis="x", labelsize=7)
    if bars:
        axes.set_yscale("log")
    axes.set_ylabel("seconds, median", fontsize=9)
