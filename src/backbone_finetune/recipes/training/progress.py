"""The results of the epochs of a run, and how far it has come."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EpochResult:
    """The results of an epoch: in training, and on the validation data after it, if there is any.

    >>> EpochResult(epoch=1, train_loss=2.1, train_accuracy=0.2, lr=1e-3, weight_decay=0.01).validation_accuracy is None
    True

    Args:
        epoch: Its number, from 1, over all phases.
        train_loss: The mean training loss of its steps.
        train_accuracy: The accuracy in its steps, 0 to 1; None if targets are values.
        lr: The classifier's learning rate in its phase, before warmup and decay.
        weight_decay: The weight decay of its phase.
        validation_loss: The mean loss after it.
        validation_accuracy: The accuracy after it, 0 to 1.
        validation_balanced_accuracy: The mean recall of the classes that have validation images.
        validation_metrics: The other metrics of the objective after it, by name, such as "r2".
        phase: The number of its phase, from 1.
        why_uncached: Why the whole model ran in its steps; None if it trained on outputs of frozen layers that ran once
            for each image.
    """

    epoch: int
    train_loss: float
    train_accuracy: float | None
    lr: float
    weight_decay: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    validation_balanced_accuracy: float | None = None
    validation_metrics: Mapping[str, float] = field(default_factory=dict)
    phase: int = 1
    why_uncached: str | None = None

    def validation(self, metric: str) -> float | None:
        """Return a metric on the validation data by its name, such as "accuracy"; None where there is none."""
        accuracies = {"accuracy": self.validation_accuracy, "balanced_accuracy": self.validation_balanced_accuracy}
        return accuracies.get(metric, self.validation_metrics.get(metric))


@dataclass
class Progress:
    """The progress of a run: ``epoch`` epochs of phase ``phase`` and ``step`` steps of the next epoch are done.

    ``steps`` counts the steps of the whole run. ``sums`` are those of the current epoch: losses, correct predictions,
    images and weights. ``lr`` and ``weight_decay`` are the rates of the current phase. ``best_epoch`` is the epoch with
    the highest value of the monitor, ``best_value``; None without one.
    ``skipped`` has the error of each unreadable image, by its path.

    >>> Progress(history=[EpochResult(1, 2.1, 0.2, 1e-3, 0.01)], step=7, steps=27).describe()
    'epoch 2, step 7'
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    steps: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    lr: float | None = None
    weight_decay: float | None = None
    best_epoch: int | None = None
    best_value: float | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    history: list[EpochResult] = field(default_factory=list)

    def describe(self) -> str:
        """Describe the current epoch, counted over the whole run from 1, and its finished steps."""
        return f"epoch {len(self.history) + 1}, step {self.step}"

    def finish_epoch(self, result: EpochResult, *, last_of_phase: bool) -> None:
        """Advance to the next epoch, and to the next phase after the last epoch of a phase.

        >>> progress = Progress(step=20, steps=20)
        >>> progress.finish_epoch(EpochResult(1, 2.1, 0.2, 1e-3, 0.01), last_of_phase=True)
        >>> progress.phase, progress.epoch, progress.step, progress.steps
        (1, 0, 0, 20)
        """
        self.history.append(result)
        self.phase, self.epoch = (self.phase + 1, 0) if last_of_phase else (self.phase, self.epoch + 1)
        self.step, self.sums = 0, [0.0] * 4
