"""``backbone-finetune train``: from a folder of images to a model file and the record of its training."""

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from accelerate import Accelerator

from backbone_finetune.names import shortened
from backbone_finetune.report import describe_by_group

from ..data.fingerprint import fingerprint_images
from ..data.sources.identical import Copy, find_copies
from ..data.sources.rows import TEST, VALIDATION
from ..export.timm_checkpoint import find_obstacle
from ..extras import import_extra
from ..features.cache import FeatureCache
from ..features.compiled import COMPILERS
from ..files import digest_files
from ..models.file import save_trained_changes, save_trained_model
from ..models.metadata import describe_objective, installed_versions
from ..objectives.kinds import Regression, SingleLabel
from ..rng import preserve_rng_state, seed_everything
from ..text import printable
from ..together import run_on_main
from ..training.config import TrainerConfig
from ..training.epoch import DivergedError
from ..training.folds import check_folds
from ..training.loop import fine_tune
from ..training.processes import find_device, make_accelerator
from ..training.progress import EpochResult
from ..training.scoring import Score
from ..training.tracking import finish_trackers
from .reporting.figures import Answers
from .runs.baselines import chance_accuracy
from .runs.comparisons import (
    FOLDS,
    add_baselines,
    left_out_if_it_fails,
    predict_folds,
)
from .runs.held_out import answers_of, ends_on_features, held_out, score_part, with_thresholds
from .runs.metrics import Metrics
from .runs.results import write_metrics, write_results
from .runs.run_folder import MODEL_FILE, RUN_FILE, UNFINISHED, open_run, publishing
from .runs.run_record import compare_runs, record_run
from .runs.tracked_run import local_tracking, start_tracker
from .settings import TrainSettings
from .setup import Task, choose_monitor, make_task

logger = logging.getLogger(__name__)


def train(settings: TrainSettings, *, recorded: Mapping[str, Any] | None = None) -> Metrics:
    """Fine-tune a model, write it to a file, and optionally compare it with baselines.

    ``settings.output`` gets ``model.safetensors``, ``run.json`` and ``metrics.json`` when the training is done, then
    ``curves.png``, ``predictions.csv`` and ``report.html``. Settings and images are checked before the training. Files
    of an earlier run are kept until new ones replace them. A stopped run resumes with the same settings. Progress is
    logged by the main process.

    >>> from pathlib import Path
    >>> train(TrainSettings(images=Path("no such folder"), output=Path("no such output")))
    Traceback (most recent call last):
    ...
    FileNotFoundError: no such folder: there is no such file or folder; ...

    Args:
        settings: The settings of the run.
        recorded: The record of an earlier run with these settings (``read_run``); differences are logged.

    Raises:
        FileExistsError: the output folder has results, another unfinished run, or a running one.
        DivergedError: the loss or the weights are not finite after an epoch; a ValueError. No model is written.
        FileNotFoundError: the images or the checkpoint do not exist.
        ModuleNotFoundError: matplotlib or the packaged weights are not installed.
        ValueError: the settings or the images are invalid; the message has a remedy.
    """
    start = time.monotonic()
    if settings.log_with is not None:
        import_extra(settings.log_with, settings.log_with)
    accelerator = make_accelerator(
        find_device(settings.device),
        mixed_precision=settings.mixed_precision,
        log_with=settings.log_with,
        project_dir=settings.output,
    )
    import_extra("matplotlib", "recipes")  # which draws the curves: a missing package is reported before any work
    if settings.compile == "openvino":
        import_extra("openvino", "openvino")
    with preserve_rng_state(), ExitStack() as exit_stack:
        seed_everything(settings.seed)
        task = make_task(settings, accelerator)
        has_folds = _check_folds(settings, task)
        config, record, copies = _start(settings, task, accelerator, exit_stack, recorded)
        exit_stack.enter_context(local_tracking(settings))
        exit_stack.callback(finish_trackers, accelerator)
        run_on_main(accelerator, lambda: start_tracker(settings, accelerator, record["arguments"]))
        try:
            start_model = copy.deepcopy(task.model) if has_folds else None
            metrics, answered = _train_model(settings, task, config, record)
            if start_model is not None:
                metrics, predicted = predict_folds(metrics, settings, task, config, start_model)
                answered = predicted | answered
            if settings.images is None if settings.baselines is None else settings.baselines:
                metrics = add_baselines(metrics, settings, task, config)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                logger.warning("stopped; the same command resumes this run, which %s keeps", settings.output)
            raise
        metrics = replace(metrics, copies=copies, seconds=round(time.monotonic() - start, 1))
        if accelerator.is_main_process:
            metrics = write_results(settings, metrics, task, accelerator, answered=answered)
    accelerator.end_training()
    return metrics


def _check_folds(settings: TrainSettings, task: Task) -> bool:
    """Return whether models train on folds of the training images; raise an error if that is not possible."""
    if settings.check_labels:
        if isinstance(task.objective, Regression):
            raise ValueError("check_labels is for classes and labels; these images have values, so leave it out")
        import_extra("cleanlab", "labels")
    if has_folds := settings.folds is not None or settings.check_labels:
        check_folds(task.train, settings.folds or FOLDS)
    return has_folds


def _start(
    settings: TrainSettings,
    task: Task,
    accelerator: Accelerator,
    exit_stack: ExitStack,
    recorded: Mapping[str, Any] | None,
) -> tuple[TrainerConfig, dict[str, Any], tuple[Copy, ...]]:
    """Open the output folder, start or resume the run, and log the images and the model.

    The main process has the lock of the folder until ``exit_stack`` is closed. Returns the config, the record and
    identical images.
    """
    fingerprints, copies = run_on_main(accelerator, lambda: _digest(task))
    unfinished, autocast = settings.output / UNFINISHED, settings.autocast_features
    config = TrainerConfig(
        accelerator,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        seed=settings.seed,
        checkpoints=unfinished / "checkpoints",
        checkpoint_steps=settings.checkpoint_steps,
        caches=None
        if settings.cache == "memory"
        else tuple(
            FeatureCache(unfinished / f"features-{part}", fingerprints.get(part, ""))
            for part in ("train", "validation", "test")
        ),
        memory_share={"memory": 1.0, "disk": 0.0}.get(settings.cache, FeatureCache.memory_share),
        cache_features=settings.cache != "off",
        views=settings.views,
        objective=task.objective,
        autocast_features=(settings.mixed_precision != "no") if autocast is None else autocast,
        monitor=choose_monitor(settings, task),
        patience=settings.patience,
        workers=settings.workers,
        compile=None if settings.compile is None else COMPILERS[settings.compile],
    )
    record = record_run(settings, task, config, fingerprints)

    run_on_main(
        accelerator, lambda: exit_stack.enter_context(open_run(settings.output, record, overwrite=settings.overwrite))
    )
    if accelerator.is_main_process:
        if differences := [] if recorded is None else compare_runs(recorded, record):
            logger.warning("this run differs from the recorded one: %s", shortened(differences, separator="; "))
        logger.info(
            f"model:    {task.architecture}, {printable(task.weights)}, on {accelerator.device}\n\n"
            f"{describe_by_group(task.model.backbone, task.model.classifier, task.model.layer_groups)}\n"
        )
        if obstacle := find_obstacle(task.model, task.architecture, **task.arguments):
            logger.info("export:   %s\n", obstacle)
    return config, record, copies


def _digest(task: Task) -> tuple[dict[str, str], tuple[Copy, ...]]:
    """Read all files once; return the fingerprint of each part, and identical images, which are logged."""
    parts = {name: data.folder for name, data in task.parts.items()}
    digests = digest_files(path for images in parts.values() for path in images.paths)
    return {name: fingerprint_images(images, digests) for name, images in parts.items()}, find_copies(parts, digests)


def _train_model(
    settings: TrainSettings, task: Task, config: TrainerConfig, record: Mapping[str, Any]
) -> tuple[Metrics, dict[str, Answers]]:
    """Train the model, and write it whatever fails after that; returns its answers to the held-out images too.

    The thresholds of labels are chosen on the validation images, after training.
    """
    accelerator = config.accelerator
    seed_everything(settings.seed + accelerator.process_index)  # dropout differs between processes
    try:
        history = fine_tune(task.model, task.train, task.parts.get(VALIDATION), task.phases, config)
    except DivergedError as error:
        hint = f"{settings.output} keeps this run: --overwrite replaces it, or pass another folder with --output"
        raise DivergedError(f"{error}; {hint}") from error
    scores: dict[str, Score] = {}
    on_features = ends_on_features(task, history)
    try:
        with left_out_if_it_fails(accelerator, "validation images"):
            scores |= score_part(task, config, VALIDATION, on_features=on_features)
        config = with_thresholds(task, config, scores.get(VALIDATION))
        with left_out_if_it_fails(accelerator, "test images"):
            scores |= score_part(task, config, TEST, on_features=on_features)
    finally:  # after an error too: a trained model is not lost
        metrics = _record_training(settings, task, config, history, scores.get(TEST))
        if record["arguments"]["autocast_features"] and on_features:
            metrics = replace(metrics, feature_precision="bf16")
        if accelerator.is_main_process:
            _write_model(settings, task, config, metrics, record)
    return metrics, answers_of(task, config, scores)


def _record_training(
    settings: TrainSettings, task: Task, config: TrainerConfig, history: Sequence[EpochResult], score: Score | None
) -> Metrics:
    """Return the record of a training, with what was measured on the test images."""
    kept = history[-1] if config.monitor is None else max(history, key=config.monitor)  # the first of several
    read = {name: len(data) - len(data.broken) for name, data in task.parts.items()}
    return Metrics(
        test_accuracy=None if score is None else score.accuracy,
        test_balanced_accuracy=None if score is None else score.balanced_accuracy,
        test_metrics={} if score is None else score.other_metrics,
        validation_accuracy=kept.validation_accuracy,
        validation_metrics=kept.validation_metrics,
        objective=describe_objective(config.objective),
        best_epoch=None if config.monitor is None else kept.epoch,
        chance=chance_accuracy(task.train.readable().targets, held_out(task).readable().targets)
        if isinstance(config.objective, SingleLabel)
        else None,
        architecture=task.architecture,
        weights=task.weights,
        phases=task.phases,
        batch_size=settings.batch_size,
        seed=settings.seed,
        processes=config.accelerator.num_processes,
        data_config=dict(task.data_config),
        class_names=task.class_names,
        train_images=read["train"],
        validation_images=read.get("validation", 0),
        test_images=read.get("test", 0),
        skipped_images=tuple(message for data in task.parts.values() for message in data.broken.values()),
        history=tuple(history),
        device=str(config.accelerator.device),
        versions=installed_versions(),
    )


def _write_model(
    settings: TrainSettings, task: Task, config: TrainerConfig, metrics: Metrics, record: Mapping[str, Any]
) -> None:
    """Write ``run.json``, the model file, which holds its metrics, and ``metrics.json``."""
    trained = replace(task, objective=config.objective)  # its thresholds may be chosen by now
    with publishing(settings.output, RUN_FILE) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    with publishing(settings.output, MODEL_FILE) as temporary:
        if task.base is None:
            save_trained_model(trained, temporary, record=asdict(metrics))
        else:
            save_trained_changes(trained, task.base, temporary, record=asdict(metrics))
    write_metrics(settings.output, metrics)
