"""What ``backbone-finetune evaluate`` writes: figures, a page and, for a model of classes, a table and a plot."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from ...files import csv_writer, replacing
from ..evaluate import Evaluation
from ..evaluate_table import TableEvaluation
from .figures import Answers
from .report import make_report


def write_evaluation(
    evaluation: Evaluation | TableEvaluation, folder: Path, *, title: str = "Evaluation"
) -> tuple[Path, ...]:
    """Write an evaluation into a folder, which is created where there is none; see `make_report` for the page.

    ``evaluation.json`` has the figures, and ``report.html`` all of it to look at. For a model of one class per image,
    ``predictions.csv`` has a line for each image with its class, the answer and the probability of that, and
    ``confusion.png`` the confusion matrix.

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
    if isinstance(evaluation, TableEvaluation):
        return numbers, page
    with replacing(predictions) as temporary:
        _write_predictions(evaluation.answers, temporary)
    from .plots import draw_confusion  # noqa: PLC0415 (matplotlib, only where it is needed)

    # The bytes of a name that are not text cannot be drawn.
    names = [score.name.encode(errors="backslashreplace").decode() for score in evaluation.classes]
    with replacing(image) as temporary:
        draw_confusion(evaluation.confusion, names, temporary)
    return numbers, predictions, image, page


def _write_predictions(answers: Answers, path: Path) -> None:
    with csv_writer(path) as rows:
        rows.writerow(["image", "class", "predicted", "probability", "right"])
        for image, target, predicted, row in zip(
            answers.paths, answers.targets, answers.predicted, answers.probabilities, strict=True
        ):
            pair = (answers.class_names[target], answers.class_names[predicted])
            rows.writerow([image, *pair, row.max(), int(target == predicted)])
