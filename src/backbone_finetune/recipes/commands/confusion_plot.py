"""The image of an evaluation: which class was taken for which."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw_confusion"]

MOST_NAMED = 50


def draw_confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as a PNG: true classes down, said ones across, shaded by the share of each row.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     draw_confusion([[3, 1], [0, 0]], ["cat", "dog"], Path(folder, "confusion.png"))
    ...     Path(folder, "confusion.png").stat().st_size > 1000
    True
    """
    count = len(class_names)
    side = min(max(4.0, 0.45 * count + 2), 24.0)
    # Not pyplot: its figures are global state, and a window system may stand behind them.
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow([[cell / max(sum(row), 1) for cell in row] for row in confusion], cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="said", ylabel="true")
    if count <= MOST_NAMED:  # more would not be readable
        # A dollar sign in a name would begin a formula.
        names = [name.replace("$", r"\$") for name in class_names]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        for true, row in enumerate(confusion):
            for said, cell in enumerate(row):
                if cell:
                    colour = "white" if cell > sum(row) / 2 else "black"
                    axes.text(said, true, str(cell), ha="center", va="center", color=colour, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
