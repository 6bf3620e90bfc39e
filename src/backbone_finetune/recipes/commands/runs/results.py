"""What a run leaves beside its model: ``metrics.json``, and figures, a page and tables for people."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from ...data.sources.rows import TRAIN
from ...training.tracking import log_figures
from ..reporting.figures import Answers
from ..reporting.label_issues import find_label_issues, write_label_issues
from ..reporting.predictions import write_predictions
from ..reporting.report import report_run
from ..settings import TrainSettings
from ..setup import Task
from .comparisons import left_out_if_it_fails
from .held_out import held_out_part
from .metrics import Metrics, describe
from .run_folder import (
    CURVES_FILE,
    LABELS_FILE,
    METRICS_FILE,
    MODEL_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    RUN_FILE,
    finish_run,
    publishing,
)

logger = logging.getLogger(__name__)


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Write ``metrics.json``: once with the model, so that no later error loses it, and again with all that follows."""
    with publishing(folder, METRICS_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(metrics), indent=2, allow_nan=False, default=os.fspath) + "\n")


def write_results(
    settings: TrainSettings,
    metrics: Metrics,
    task: Task,
    accelerator: Accelerator,
    *,
    answered: Mapping[str, Answers],
) -> Metrics:
    """Write the results of a run whose model is written, log them, and mark the run as finished.

    Args:
        settings: Those of the run, with its output folder.
        metrics: The record of the run.
        task: The trained model, and its images.
        accelerator: The accelerator of the run.
        answered: What the model answered on the validation and test images, by part; and, on the training images, what
            models of folds did that did not train on them.

    Returns:
        The record with what was found in the images.
    """
    from ..reporting.plots import draw_curves  # noqa: PLC0415 (matplotlib is slow to import)

    folder, names = settings.output, [RUN_FILE, MODEL_FILE, METRICS_FILE]
    issues = None
    if settings.check_labels and TRAIN in answered:
        with left_out_if_it_fails(None, LABELS_FILE):
            issues = find_label_issues(answered[TRAIN])
    metrics = replace(metrics, label_issues=None if issues is None else len(issues))
    logger.info(describe(metrics))
    tested = {"accuracy": metrics.test_accuracy, "balanced_accuracy": metrics.test_balanced_accuracy}
    figures = {name: value for name, value in {**tested, **metrics.test_metrics}.items() if value is not None}
    log_figures(accelerator, {f"test/{name}": value for name, value in figures.items()}, len(metrics.history))
    write_metrics(folder, metrics)
    with left_out_if_it_fails(None, CURVES_FILE), publishing(folder, CURVES_FILE) as temporary:
        main = task.objective.main_metric
        test = {"test": figures[main]} if main in figures else {}
        draw_curves(metrics.history, test | metrics.references(), temporary, metric=main)
        names.append(CURVES_FILE)
    if issues is not None:
        with publishing(folder, LABELS_FILE) as temporary:
            write_label_issues(issues, temporary)
            names.append(LABELS_FILE)
    if answered:
        with publishing(folder, PREDICTIONS_FILE) as temporary:
            write_predictions(answered, temporary)
            names.append(PREDICTIONS_FILE)
    if (answers := answered.get(held_out_part(task))) is not None:
        with left_out_if_it_fails(None, REPORT_FILE), publishing(folder, REPORT_FILE) as temporary:
            curves = folder / CURVES_FILE if CURVES_FILE in names else None
            page = report_run(metrics, answers, task.model, settings, issues=issues, curves=curves)
            temporary.write_text(page, encoding="utf-8")
            names.append(REPORT_FILE)
    finish_run(folder, names)
    logger.info("\nwrote %s", ", ".join(str(folder / name) for name in names))
    return metrics
