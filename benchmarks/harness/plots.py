"""Plots of a report: what a step costs beside its limit, and how the cost falls with the depth of freezing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.results import Report, Row, median, ratio_of, write_file

_COLOURS = {"unfrozen": "#b0413e", "partial": "#e0a458", "frozen": "#2e6f95"}
_LIMIT_COLOUR = "#222222"


def draw_report(report: Report, path: Path) -> None:
    """Draw a row of plots for each model: backward time, step time, and the curve of cost against depth."""
    models = report.models()
    figure = Figure(figsize=(15, 3.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 3, squeeze=False)
    for line, model in zip(axes, models, strict=True):
        draw_bars(line[0], report, model, "backward_ms", "backward")
        draw_device_times(line[0], report, model)
        draw_bars(line[1], report, model, "step_ms", "whole step")
        draw_depth_curve(line[2], report, model)
    facts = report.environment
    where = facts.get("device_name") or f"{facts['cpu']}, {facts['threads']} threads"
    figure.suptitle(f"{where}, torch {facts['torch']}, {facts['date']}", fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=110))


def draw_bars(axes: Any, report: Report, model: str, clock: str, title: str) -> None:
    """Draw a bar for each depth of freezing, and the limit as a line; log scale where the bars are far apart."""
    rows = [row for row in report.rows_of(model) if row.variant != "limit"]
    heights = [median(getattr(row, clock)) for row in rows]
    labels = [str(row.trainable_groups) if row.variant == "partial" else row.variant for row in rows]
    axes.bar(range(len(rows)), heights, color=[_COLOURS[row.variant] for row in rows])
    axes.set_xticks(range(len(rows)), labels, rotation=0 if len(rows) < 9 else 90)
    limit = report.row(model, "limit")
    lowest = min(heights, default=1.0)
    if limit is not None:
        height = median(getattr(limit, clock))
        lowest = min(lowest, height)
        axes.axhline(height, color=_LIMIT_COLOUR, linestyle="--", label=f"limit: {height:.3g} ms")
        axes.legend(fontsize=8)
    if max(heights, default=1.0) > 100 * lowest:
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 2)
    batch = f"batch {rows[0].batch_size} of {rows[0].image_size} pixels" if rows else ""
    axes.set_title(f"{model}: {title}, {batch}", fontsize=10)
    axes.set_xlabel("trainable layer groups of the backbone", fontsize=9)
    axes.set_ylabel("ms, median", fontsize=9)


def draw_device_times(axes: Any, report: Report, model: str) -> None:
    """Mark what a GPU computes in each backward: where the mark is far below the bar, the bar is the host's time."""
    rows = [row for row in report.rows_of(model) if row.variant != "limit"]
    marks = [(place, row.backward_device_ms) for place, row in enumerate(rows) if row.backward_device_ms is not None]
    if marks:
        axes.plot(*zip(*marks, strict=True), "_", color=_LIMIT_COLOUR, markersize=16, label="kernels alone")
        axes.set_ylim(bottom=min(axes.get_ylim()[0], min(height for _, height in marks) / 2))
        axes.legend(fontsize=8)


def draw_depth_curve(axes: Any, report: Report, model: str) -> None:
    """Draw backward time against frozen groups, relative to unfrozen, beside what the FLOPs of what trains predict."""
    rows = [row for row in report.rows_of(model) if row.trainable_groups is not None]
    unfrozen = report.row(model, "unfrozen")
    if unfrozen is None:
        axes.set_axis_off()
        return
    frozen_groups = [_groups(unfrozen) - _groups(row) for row in rows]
    costs = [ratio_of(row, unfrozen, "backward_ms") for row in rows]
    axes.errorbar(
        frozen_groups,
        [cost.median for cost in costs],
        yerr=[[cost.median - cost.low for cost in costs], [cost.high - cost.median for cost in costs]],
        marker="o",
        color=_COLOURS["frozen"],
        label="measured, 95 % interval",
    )
    if unfrozen.backward_flops:
        predicted = [(row.backward_flops or 0) / unfrozen.backward_flops for row in rows]
        axes.plot(frozen_groups, predicted, ":", color=_COLOURS["unfrozen"], label="predicted by FLOPs")
    for first, again in report.noise_of(model):
        if first is unfrozen:
            noise = ratio_of(again, first, "backward_ms")
            axes.axhspan(noise.low, noise.high, color="#999999", alpha=0.3, label="A/A: unfrozen again")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.set_title(f"{model}: backward against depth", fontsize=10)
    axes.set_xlabel("frozen layer groups", fontsize=9)
    axes.set_ylabel("backward, of unfrozen", fontsize=9)


def _groups(row: Row) -> int:
    assert row.trainable_groups is not None
    return row.trainable_groups
