"""The best epoch by validation data: its weights are kept, phases end early, and a resumed run does the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.progress import EpochResult
from backbone_finetune.recipes.training.scoring import evaluate

ACCELERATOR = Accelerator(cpu=True)
HEAD = Phase(epochs=4, lr=0.05)
BOTH = Phase(epochs=4, trainable_groups=1, lr=0.05, backbone_lr=0.05)


def make_data(count: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=generator), torch.randint(3, (count,), generator=generator))


def make_model() -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3))


def train(phases: list[Phase], monitor: Callable[[EpochResult], float] | None, **settings: Any) -> Any:
    model = make_model()
    config = TrainerConfig(ACCELERATOR, batch_size=8, show_progress=False, monitor=monitor, **settings)
    return model, fine_tune(model, make_data(40), make_data(60, seed=1), phases, config)


def rate(*values: float) -> Callable[[EpochResult], float]:
    """Return a monitor with the given value for each epoch."""
    return lambda result: values[result.epoch - 1]


def same(model: FineTuneModel, other: FineTuneModel) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def first_epochs(count: int) -> FineTuneModel:
    """Train both phases for ``count`` epochs in total."""
    parts = [Phase(**{**vars(HEAD), "epochs": min(count, 4)})]
    if count > 4:
        parts.append(Phase(**{**vars(BOTH), "epochs": count - 4}))
    return train(parts, None)[0]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((1, 2, 3, 4, 5, 6, 7, 8), 8),
        ((1, 2, 3, 4, 5, 9, 7, 8), 6),
        ((1, 2, 3, 4, 3, 3, 3, 3), 4),  # the second phase is worse
        ((-1, -2, -3, -4, -3, -3, -3, -3), 1),
        ((1, 1, 1, 1, 1, 1, 1, 1), 1),  # the first of equal values
    ],
)
def test_the_weights_of_the_best_epoch_are_kept(values: tuple[float, ...], best: int) -> None:
    """A phase starts with the best weights of the previous phase."""
    model, history = train([HEAD, BOTH], rate(*values))
    assert [result.epoch for result in history] == list(range(1, 9))
    if best <= 4 or values[3] == max(values[:4]):
        assert same(model, first_epochs(best))


def test_the_kept_model_has_the_best_accuracy() -> None:
    model, history = train([HEAD, BOTH], lambda result: result.validation_accuracy or 0.0)
    score = evaluate(model, make_data(60, seed=1), TrainerConfig(ACCELERATOR))
    assert score.accuracy == max(result.validation_accuracy for result in history)


def test_a_phase_ends_when_patience_is_exceeded(tmp_path: Path) -> None:
    _, history = train([HEAD, BOTH], rate(1, 2, 1, 1, 1, 3, 1, 1), patience=2, checkpoints=tmp_path)
    assert len(history) == 8
    _, history = train([HEAD, BOTH], rate(2, 1, 1, 1, 1, 1, 1, 1), patience=2)
    assert len(history) == 3 + 2  # in each phase, epochs without improvement


@pytest.mark.parametrize(
    ("values", "checkpoint_steps"),
    [
        ((1, 5, 2, 2, 3, 9, 2, 2), 2),  # the best epoch is in the second phase; checkpoints within an epoch
        ((1, 5, 2, 2, 3, 1, 2, 2), 1000),  # in the first phase; checkpoints after each epoch, so also between phases
    ],
)
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7])
def test_a_killed_run_keeps_the_same_epoch(
    tmp_path: Path, stop: int, values: tuple[float, ...], checkpoint_steps: int
) -> None:
    class StopError(Exception):
        pass

    def stopping(result: EpochResult) -> float:
        if result.epoch == stop + 1:
            raise StopError
        return values[result.epoch - 1]

    with pytest.raises(StopError):
        train([HEAD, BOTH], stopping, checkpoints=tmp_path, checkpoint_steps=checkpoint_steps)
    resumed, history = train([HEAD, BOTH], rate(*values), checkpoints=tmp_path, checkpoint_steps=checkpoint_steps)
    whole, expected = train([HEAD, BOTH], rate(*values))
    assert history == expected
    assert same(resumed, whole)


def test_an_invalid_monitor_is_refused() -> None:
    config = TrainerConfig(ACCELERATOR, monitor=rate(1), show_progress=False)
    with pytest.raises(ValueError, match="monitor was given without validation data"):
        fine_tune(make_model(), make_data(40), None, [HEAD], config)
    with pytest.raises(
        ValueError, match=r"patience was given without monitor, .*; pass one \(train --monitor accuracy\)"
    ):
        TrainerConfig(ACCELERATOR, patience=1)
    with pytest.raises(ValueError, match="monitor returned nan for epoch 1; it must return a number"):
        train([HEAD], rate(float("nan")))


def test_without_validation_data_nothing_is_evaluated() -> None:
    model = make_model()
    history = fine_tune(model, make_data(40), None, [HEAD], TrainerConfig(ACCELERATOR, show_progress=False))
    assert {(each.validation_accuracy, each.validation_loss) for each in history} == {(None, None)}
