"""The images that a model did not train on, and what it answers on them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...data.images import ImageDataset
from ...data.sources.rows import TEST, VALIDATION
from ...objectives.kinds import MultiLabel
from ...training.config import TrainerConfig
from ...training.loop import report_skipped
from ...training.phase_data import PhaseData, prepare_data
from ...training.progress import EpochResult
from ...training.scoring import Score, evaluate
from ..reporting.figures import Answers, make_answers
from ..setup import Task

logger = logging.getLogger(__name__)


def held_out_part(task: Task) -> str:
    """Return the part of the images that the reported accuracy is of: the test images, else the validation images."""
    return TEST if TEST in task.parts else VALIDATION


def held_out(task: Task) -> ImageDataset:
    """Return the images of this part."""
    return task.parts[held_out_part(task)]


def ends_on_features(task: Task, history: Sequence[EpochResult]) -> bool:
    """Return whether the last phase trained the classifier alone, on computed features."""
    return history[-1].why_uncached is None and task.phases[-1].trainable_groups == 0


def score_part(task: Task, config: TrainerConfig, part: str, *, on_features: bool) -> dict[str, Score]:
    """Evaluate a trained model on a part of the images; return the score by the part's name, or nothing without images.

    A classifier that was trained ``on_features`` answers on features that are computed like those.
    """
    if (images := task.parts.get(part)) is None:
        return {}
    known, model = dict(images.broken), task.model.to(config.accelerator.device)
    data = PhaseData(images, None, model)
    if on_features:
        data = prepare_data(model.freeze_backbone(), images, None, config, name=part)
    score = evaluate(data.module, data.train, config, name=part, keep_outputs=True)
    report_skipped([images], known, config.accelerator)
    return {part: score}


def with_thresholds(task: Task, config: TrainerConfig, score: Score | None) -> TrainerConfig:
    """Choose the threshold of each label by the score on the validation images, if there is one."""
    objective = config.objective
    if isinstance(objective, MultiLabel) and score is not None:
        return replace(config, objective=objective.choose_thresholds(score.answers, score.targets))
    if isinstance(objective, MultiLabel) and VALIDATION not in task.parts and config.accelerator.is_main_process:
        logger.warning("the threshold of each label is 0.5: there are no validation images to choose it on")
    return config


def answers_of(task: Task, config: TrainerConfig, scores: Mapping[str, Score]) -> dict[str, Answers]:
    """Return what the model answered on each part, with the names of the images."""
    answered = {}
    for part, score in scores.items():
        assert score.outputs is not None
        images = task.parts[part].folder.select(score.indices.tolist())
        answered[part] = make_answers(images, config.objective.predict(score.outputs), config.objective)
    return answered
