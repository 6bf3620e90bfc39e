"""``predictions.csv``: what a model answered on labelled images, how sure it was, and whether that is right."""

from collections.abc import Mapping
from pathlib import Path

from ...files import csv_writer
from ...objectives.kinds import MultiLabel, Regression
from .figures import Answers


def write_predictions(answered: Mapping[str, Answers], path: Path) -> None:
    """Write a CSV file with a line for each image of each split, in order.

    After ``image`` and ``split``, the columns of a model of classes are ``class``, ``predicted``, the ``probability``
    of that, and ``right``, 0 or 1. Those of a model of labels are ``labels`` and ``predicted``, as "cat;dog", the
    ``probabilities`` of these, and ``right``. A model of values has three columns for each value, such as ``age``,
    ``age predicted`` and ``age error``, which is the second minus the first.

    Args:
        answered: The answers by the name of the split.
        path: The file to write.
    """
    with csv_writer(path) as rows:
        for number, (split, answers) in enumerate(answered.items()):
            if not number:
                rows.writerow(["image", "split", *_columns(answers)])
            rows.writerows([image, split, *_cells(answers, index)] for index, image in enumerate(answers.paths))


def _columns(answers: Answers) -> list[str]:
    if isinstance(answers.objective, Regression):
        return [f"{name}{which}" for name in answers.class_names for which in ("", " predicted", " error")]
    if isinstance(answers.objective, MultiLabel):
        return ["labels", "predicted", "probabilities", "right"]
    return ["class", "predicted", "probability", "right"]


def _cells(answers: Answers, index: int) -> list[object]:
    target, row = answers.targets[index], answers.probabilities[index]
    if isinstance(answers.objective, Regression):
        return [cell for pair in zip(target, row, strict=True) for cell in (*pair, pair[1] - pair[0])]
    given, predicted = answers.chosen(index)
    names = [";".join(answers.class_names[label] for label in labels) for labels in (given, predicted)]
    return [*names, ";".join(str(row[label]) for label in predicted), int(given == predicted)]
