"""The plots of a training run and of an evaluation."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...training.progress import EpochResult

MOST_NAMED = 50
REFERENCE_STYLES = (("black", "-"), *(("grey", style) for style in ("-", "--", "-.", ":")))  # one each for five


def draw_curves(
    history: Sequence[EpochResult], references: Mapping[str, float], path: Path, metric: str = "accuracy"
) -> None:
    """Draw the loss and a metric by epoch as a PNG, with a horizontal line for each reference."""
    epochs = [result.epoch for result in history]
    # Not pyplot: its figures are global state, and it may use a window system. Narrow, to be readable on a phone.
    figure = Figure(figsize=(4.5, 6), dpi=130, layout="constrained")
    loss, accuracy = figure.subplots(2, 1)
    loss.plot(epochs, [result.train_loss for result in history], marker=".", label="training")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    validation = [value for result in history if (value := result.validation(metric)) is not None]
    if validation:
        accuracy.plot(epochs, validation, marker=".", color="C2", label="validation")
    if metric == "accuracy":
        accuracy.plot(epochs, [result.train_accuracy for result in history], marker=".", color="C0", label="training")
    for (name, value), (colour, style) in zip(references.items(), cycle(REFERENCE_STYLES)):
        accuracy.axhline(value, color=colour, linestyle=style, label=name)
    accuracy.set(xlabel="epoch", ylabel=metric.replace("_", " "), ylim=(min(0, *validation, 0), 1))
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as a PNG: true classes down, predicted ones across, shaded by the share of each row."""
    count = len(class_names)
    side = min(max(4.0, 0.45 * count + 2), 24.0)
    # Not pyplot: its figures are global state, and it may use a window system.
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow([[cell / max(sum(row), 1) for cell in row] for row in confusion], cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true")
    if count <= MOST_NAMED:  # more would not be readable
        # A dollar sign in a name would start a formula.
        names = [name.replace("$", r"\$") for name in class_names]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        for true, row in enumerate(confusion):
            for predicted, cell in enumerate(row):
                if cell:
                    colour = "white" if cell > sum(row) / 2 else "black"
                    axes.text(predicted, true, str(cell), ha="center", va="center", color=colour, fontsize=8)
    with warnings.catch_warnings():
        # A character that matplotlib's font lacks, such as a Chinese one, is a box; report.html has the names.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
