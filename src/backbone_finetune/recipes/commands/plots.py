"""The image of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..training.checkpoints import EpochResult

__all__ = ["draw_curves"]


def draw_curves(history: Sequence[EpochResult], references: Mapping[str, float], path: Path) -> None:
    """Draw loss and accuracy by epoch as a PNG, with a line across for each reference accuracy.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     draw_curves([EpochResult(1, 2.3, 0.1, 0.1)], {"chance": 0.1}, Path(folder, "curves.png"))
    ...     Path(folder, "curves.png").stat().st_size > 1000
    True
    """
    epochs = [result.epoch for result in history]
    # Not pyplot: its figures are global state, and a window system may stand behind them.
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [result.train_loss for result in history], marker=".", label="training")
    loss.set(xlabel="epoch", ylabel="cross entropy", ylim=(0, None))
    accuracy.plot(epochs, [result.test_accuracy for result in history], marker=".", color="C2", label="test")
    accuracy.plot(epochs, [result.train_accuracy for result in history], marker=".", color="C0", label="training")
    for (name, value), style in zip(references.items(), ("-", "--", "-.", ":"), strict=False):
        accuracy.axhline(value, color="grey", linestyle=style, label=name)
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1))
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best")
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
