"""The kinds of targets: class indices, soft targets, labels and values."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from typing_extensions import Self

from ..checking import Above0, Finite, Share
from ..data.images import IGNORED, is_read
from ..data.targets import check_targets, describe_targets
from ..sending import send
from . import metrics
from .objective import Loss, Objective

_as_list = BeforeValidator(lambda values: values.tolist() if isinstance(values, Tensor) else values)
Positives = Annotated[tuple[Above0, ...], _as_list]
Shares = Annotated[tuple[Share, ...], _as_list]
Numbers = Annotated[tuple[Finite, ...], _as_list]
CHECKED = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


class _Classes(Objective):
    """Each image has one correct class."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Return probabilities that sum to 1."""
        return outputs.softmax(-1)

    def answer(self, outputs: Tensor) -> Tensor:
        """Return the most likely class of each image, ``(B,)``."""
        return outputs.argmax(-1)

    def classes(self, targets: Tensor) -> Tensor:
        """Return the correct class of each image, ``(B,)``."""
        return targets

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Tell for which images the correct class is the most likely."""
        return outputs.argmax(-1) == self.classes(targets)

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the accuracy, and the mean recall of the classes that have images."""
        return metrics.accuracies(answers, self.classes(targets))


@dataclass(frozen=True, config=CHECKED)
class SingleLabel(_Classes):
    """One class per image: targets are class indices ``(B,)``, and the loss is torch's ``cross_entropy``.

    With ``class_weights`` the loss of a batch, and of an epoch, is the sum of the weighted losses divided
    by the sum of the images' weights.

    >>> SingleLabel().measure(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))
    {'accuracy': 0.75, 'balanced_accuracy': 0.75}

    Args:
        class_weights: One positive weight per class.
        label_smoothing: The share of each target that is spread evenly over all classes, at least 0 and below 1.
        loss: A custom loss, without ``class_weights`` and ``label_smoothing``.
    """

    class_weights: Positives | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    loss: Loss | None = None

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.loss is not None and (self.class_weights is not None or self.label_smoothing):
            raise ValueError("loss and class_weights or label_smoothing were both given; weigh and smooth in your loss")
        return self

    def check(self, name: str, targets: Tensor, outputs: int | None) -> None:
        """Raise ValueError unless all targets are class indices, or ``IGNORED``."""
        check_targets(name, targets, outputs)
        if self.class_weights is not None and outputs not in {None, len(self.class_weights)}:
            raise ValueError(f"class_weights has {len(self.class_weights)} entries for {outputs} classes")

    def default_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the weighted cross entropy of each image, ``(B,)``."""
        weights = None if self.class_weights is None else _on(outputs, self.class_weights)
        smoothing = self.label_smoothing
        targets = self.scale(targets)
        return cross_entropy(
            outputs, targets, weights, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
        )

    def weights(self, targets: Tensor) -> Tensor | None:
        """Return the weight of each image's class."""
        if self.class_weights is None:
            return None
        weights = _on(targets, self.class_weights, torch.float32)
        return weights[targets.long().clamp(min=0)].where(is_read(targets), 0)

    def scale(self, targets: Tensor) -> Tensor:
        """Return class indices as torch's losses take them."""
        return targets.long()


@dataclass(frozen=True, config=CHECKED)
class SoftLabels(_Classes):
    """A probability for each class: targets are rows ``(B, K)`` that sum to 1, e.g. of several annotators or a teacher.

    The loss is torch's ``cross_entropy``. A prediction is correct if the most likely class is the target's.

    >>> SoftLabels().losses(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    tensor([0.6931])
    """

    loss: Loss | None = None

    def check(self, name: str, targets: Tensor, outputs: int | None) -> None:
        """Raise ValueError unless all targets are non-negative rows that sum to 1, to a thousandth."""
        _check_rows(name, targets, outputs, "SoftLabels takes a row of one probability per class")
        wrong = ~((targets >= 0).all(1) & ((targets.double().sum(1) - 1).abs() <= 1e-3))
        _refuse(name, targets, wrong, "SoftLabels takes rows of numbers from 0 on that sum to 1")

    def default_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross entropy of each image, ``(B,)``."""
        losses = cross_entropy(outputs, self.scale(targets).nan_to_num().to(outputs.dtype), reduction="none")
        return losses.where(is_read(targets), 0)

    def classes(self, targets: Tensor) -> Tensor:
        """Return the most likely class of each target."""
        return targets.argmax(-1).where(is_read(targets), IGNORED)


@dataclass(frozen=True, config=CHECKED)
class MultiLabel(Objective):
    """Any number of labels per image: targets are rows ``(B, K)`` of 0 and 1; each output is for one label.

    The loss of an image is the mean binary cross entropy of its labels. A label is predicted where its sigmoid
    is above its threshold; an image is correct if all of its labels are.

    >>> objective = MultiLabel().choose_thresholds(torch.tensor([[0.0], [0.75], [0.25]]), torch.tensor([[0], [1], [0]]))
    >>> objective.thresholds
    (0.5,)

    Args:
        thresholds: One per label, from 0 to 1; None means 0.5 for all. `choose_thresholds` chooses them.
        loss: A custom loss.
    """

    main_metric: ClassVar[str] = "mean_average_precision"
    thresholds: Shares | None = None
    loss: Loss | None = None

    def check(self, name: str, targets: Tensor, outputs: int | None) -> None:
        """Raise ValueError unless all targets are rows of 0 and 1."""
        _check_rows(name, targets, outputs, "MultiLabel takes a row of 0 and 1, one per label")
        _refuse(name, targets, ((targets != 0) & (targets != 1)).any(1), "MultiLabel takes rows of 0 and 1")
        if self.thresholds is not None and len(self.thresholds) != targets.shape[1]:
            raise ValueError(f"thresholds has {len(self.thresholds)} entries for {targets.shape[1]} labels")

    def default_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean binary cross entropy of each image, ``(B,)``."""
        wanted = self.scale(targets).nan_to_num().to(outputs.dtype)
        return binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(1).where(is_read(targets), 0)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return a probability from 0 to 1 per label."""
        return outputs.sigmoid()

    def choose(self, probabilities: Tensor) -> Tensor:
        """Return the predicted labels of each image, ``(B, K)``: those with a probability above their threshold."""
        return probabilities > (0.5 if self.thresholds is None else _on(probabilities, self.thresholds))

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return which images have exactly the labels of their target."""
        return (self.choose(self.predict(outputs)) == targets.float().round()).all(1)  # may be mixed

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the mean average precision, AUROC and F1 over labels, and the share of correct images.

        The AUROC is the mean over the labels that some images have and others have not; it is left out if none is so.
        """
        chosen = self.choose(answers.double())
        areas = [area for area in map(metrics.auroc, answers.T, targets.T) if area is not None]
        return {
            "mean_average_precision": metrics.mean_average_precision(answers, targets),
            **({"mean_auroc": sum(areas) / len(areas)} if areas else {}),
            "macro_f1": metrics.macro_f1(chosen, targets),
            "accuracy": float((chosen == targets).all(1).double().mean()),
        }

    def choose_thresholds(self, probabilities: Tensor, targets: Tensor) -> "MultiLabel":
        """Return a copy with the thresholds that maximize each label's F1 on probabilities ``(N, K)`` of N images.

        Use images that are neither in the training data nor in the data on which F1 is measured.
        """
        return MultiLabel(metrics.best_thresholds(probabilities, targets), self.loss)


@dataclass(frozen=True, config=CHECKED)
class Regression(Objective):
    """Numbers: targets are values ``(B,)`` of one output or ``(B, K)`` of several, and the loss is the squared error.

    The network learns ``(value - mean) / std``, and `predict` converts its outputs to values. A learning rate that
    works for classes works for values of mean 0 and standard deviation 1; `scaled_to` sets both from training targets.

    >>> objective = Regression().scaled_to(torch.tensor([100.0, 300.0]))
    >>> objective.mean, objective.std, objective.predict(torch.tensor([[0.5]]))
    ((200.0,), (100.0,), tensor([[250.]]))

    Args:
        mean: One per output, or one for all.
        std: One per output, or one for all.
        loss: A custom loss of outputs and ``(value - mean) / std``, both ``(B, K)``.
    """

    main_metric: ClassVar[str] = "r2"
    has_accuracy: ClassVar[bool] = False
    mean: Numbers = (0.0,)
    std: Positives = (1.0,)
    loss: Loss | None = None

    def check(self, name: str, targets: Tensor, outputs: int | None) -> None:
        """Raise ValueError unless all targets are finite numbers, one per output."""
        if targets.ndim == 1 and outputs in {None, 1}:
            targets = targets[:, None]
        _check_rows(name, targets, outputs, "Regression takes one number per output")
        _refuse(name, targets, ~targets.double().isfinite().all(1), "Regression takes finite numbers")

    def default_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the squared error of each image, the mean over its outputs, ``(B,)``."""
        wanted = self.scale(targets).nan_to_num().to(outputs.dtype)
        return mse_loss(_as_rows(outputs), wanted, reduction="none").mean(1).where(is_read(targets), 0)

    def scale(self, targets: Tensor) -> Tensor:
        """Return ``(value - mean) / std``, ``(B, K)``."""
        rows = _as_rows(targets).float()
        return (rows - _on(rows, self.mean)) / _on(rows, self.std)

    def predict(self, outputs: Tensor) -> Tensor:
        """Return values in the units of the targets, ``(B, K)``."""
        return _as_rows(outputs) * _on(outputs, self.std) + _on(outputs, self.mean)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return False for each image: values are not correct or incorrect."""
        return torch.zeros(len(targets), dtype=torch.bool, device=targets.device)

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute R squared and the mean absolute error, each the mean over the outputs."""
        errors, r2 = metrics.regression_errors(answers, _as_rows(targets))
        return {"r2": float(r2.mean()), "mean_absolute_error": float(errors.mean())}

    def scaled_to(self, targets: Tensor) -> "Regression":
        """Return a copy with the mean and the standard deviation of targets, 1 if all are equal."""
        rows = _as_rows(targets[is_read(targets)]).double()
        std = rows.std(0, correction=0)
        std = std.where(std > metrics.ROUNDING * rows.abs().amax(0), 1)
        return Regression(tuple(rows.mean(0).tolist()), tuple(std.tolist()), self.loss)


def _check_rows(name: str, targets: Tensor, outputs: int | None, wanted: str) -> None:
    """Raise ValueError unless targets are ``(N, outputs)`` numbers."""
    if targets.ndim != 2 or targets.is_complex() or (outputs is not None and targets.shape[1] != outputs):
        network = "" if outputs is None else f", and the network has {outputs} outputs"
        raise ValueError(f"{name}: the targets are {describe_targets(targets)}; {wanted}{network}")


def _refuse(name: str, targets: Tensor, wrong: Tensor, wanted: str) -> None:
    """Raise ValueError with the first invalid target, if there is one."""
    if wrong.any():
        index = int(wrong.int().argmax())
        row = [round(value, 6) for value in targets[index].tolist()]
        raise ValueError(f"{name}: target {index} is {row if len(row) <= 8 else f'{row[:8]} ...'}; {wanted}")


def _as_rows(values: Tensor) -> Tensor:
    return values[:, None] if values.ndim == 1 else values


def _on(like: Tensor, values: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on another's device, without synchronizing."""
    made = torch.tensor(values, dtype=like.dtype if dtype is None else dtype, device="cpu")
    return send(made, like.device)
