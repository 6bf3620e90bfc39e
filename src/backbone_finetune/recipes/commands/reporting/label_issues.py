"""Training images whose class looks wrong, by cleanlab, from predictions of models that did not train on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from ...extras import import_extra
from ...files import csv_writer
from ...text import one_line
from .figures import Answers

__all__ = ["LabelIssue", "check_extra", "find_label_issues", "write_label_issues"]


@dataclass(frozen=True)
class LabelIssue:
    """An image whose class looks wrong: the class that it was given, and the one that looks right.

    ``score`` is cleanlab's label quality: the probability of the given class, by a model that did not train on the
    image.
    """

    path: Path
    given: str
    suggested: str
    score: float


def check_extra() -> None:
    """Raise ModuleNotFoundError if cleanlab is not installed."""
    import_extra("cleanlab", "labels")


def find_label_issues(answers: Answers) -> list[LabelIssue]:
    """Find images whose class looks wrong, the worst first, by confident learning (Northcutt et al. 2021) in cleanlab.

    Args:
        answers: To images, by models that did not train on them (`cross_predict`).

    Raises:
        ModuleNotFoundError: cleanlab is not installed.
        ValueError: cleanlab fails on these answers.
    """
    targets, probabilities = numpy.asarray(answers.targets), answers.probabilities
    find = import_extra("cleanlab.filter", "labels").find_label_issues
    try:  # in this process: cleanlab would start one per core, for less than a second of work on 50,000 images
        found = find(targets, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"cleanlab failed ({type(error).__name__}: {one_line(error)})") from error
    return [
        LabelIssue(
            answers.paths[index],
            answers.class_names[targets[index]],
            answers.class_names[answers.predicted[index]],
            float(probabilities[index, targets[index]]),
        )
        for index in found.tolist()
    ]


def write_label_issues(issues: Sequence[LabelIssue], path: Path) -> None:
    """Write a CSV file with a line for each image."""
    with csv_writer(path) as rows:
        rows.writerow(["image", "class", "suggested", "score"])
        rows.writerows((issue.path, issue.given, issue.suggested, issue.score) for issue in issues)
