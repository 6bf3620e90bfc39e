"""Training images whose label looks wrong, by cleanlab, from predictions of models that did not train on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from ...extras import import_extra
from ...files import csv_writer
from ...objectives.kinds import MultiLabel
from ...text import one_line
from .figures import Answers


@dataclass(frozen=True)
class LabelIssue:
    """An image whose class or labels look wrong: those that it was given, and those that look right.

    ``score`` is cleanlab's label quality by a model that did not train on the image: the probability of the given
    class, or a mean of the probabilities that each label is right, in which the least counts most.
    """

    path: Path
    given: str
    suggested: str
    score: float


def find_label_issues(answers: Answers) -> list[LabelIssue]:
    """Find images whose label looks wrong, the worst first, by confident learning (Northcutt et al. 2021) in cleanlab.

    Args:
        answers: To images, by models that did not train on them (`cross_predict`).

    Raises:
        ModuleNotFoundError: cleanlab is not installed.
        ValueError: cleanlab fails on these answers.
    """
    targets: Any
    package, targets = "cleanlab", numpy.asarray(answers.targets)
    if isinstance(answers.objective, MultiLabel):
        package, targets = "cleanlab.multilabel_classification", [numpy.flatnonzero(row).tolist() for row in targets]
    filtering, ranking = (import_extra(f"{package}.{name}", "labels") for name in ("filter", "rank"))
    try:  # in this process: cleanlab would start one per core, for less than a second of work on 50,000 images
        found = filtering.find_label_issues(
            targets, answers.probabilities, return_indices_ranked_by="self_confidence", n_jobs=1
        )
        scores = ranking.get_label_quality_scores(targets, answers.probabilities)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"cleanlab failed ({type(error).__name__}: {one_line(error)})") from error
    return [LabelIssue(answers.paths[index], *answers.words(index), float(scores[index])) for index in found.tolist()]


def write_label_issues(issues: Sequence[LabelIssue], path: Path) -> None:
    """Write a CSV file with a line for each image."""
    with csv_writer(path) as rows:
        rows.writerow(["image", "class", "suggested", "score"])
        rows.writerows((issue.path, issue.given, issue.suggested, issue.score) for issue in issues)
