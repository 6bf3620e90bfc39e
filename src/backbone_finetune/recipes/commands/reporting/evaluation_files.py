"""What ``backbone-finetune evaluate`` writes: figures, a page, a table of the images and, for classes, a plot."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from backbone_finetune.files import replacing

from .predictions import write_predictions
from .report import make_report
from .scores import Evaluation, TableEvaluation


def write_evaluation(
    evaluation: Evaluation | TableEvaluation, folder: Path, *, title: str = "Evaluation"
) -> tuple[Path, ...]:
    """Write an evaluation into a folder, which is created where there is none; see `make_report` for the page.

    ``evaluation.json`` has the figures, ``report.html`` all of it to look at, and ``predictions.csv`` a line for each
    image (`write_predictions`). For a model of one class per image, ``confusion.png`` has the confusion matrix.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers, predictions, image, page = (
        folder / name for name in ("evaluation.json", "predictions.csv", "confusion.png", "report.html")
    )
    with replacing(numbers) as temporary:
        figures = {each.name: getattr(evaluation, each.name) for each in fields(evaluation) if each.name != "answers"}
        temporary.write_text(json.dumps(figures, indent=2, default=asdict) + "\n")
    with replacing(page) as temporary:
        temporary.write_text(make_report(evaluation, title=title, facts={}), encoding="utf-8")
    with replacing(predictions) as temporary:
        write_predictions({evaluation.split: evaluation.answers}, temporary)
    if isinstance(evaluation, TableEvaluation):
        return numbers, predictions, page
    from .plots import draw_confusion  # noqa: PLC0415 (matplotlib, only where it is needed)

    # The bytes of a name that are not text cannot be drawn.
    names = [score.name.encode(errors="backslashreplace").decode() for score in evaluation.classes]
    with replacing(image) as temporary:
        draw_confusion(evaluation.confusion, names, temporary)
    return numbers, predictions, image, page
