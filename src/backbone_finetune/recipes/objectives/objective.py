"""What a kind of targets defines: check, loss, predictions and metrics."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from ..data.images import is_read

Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(ABC):
    """A kind of targets. B is the number of images, K that of outputs; targets are ``(B,)`` or ``(B, K)``.

    ``loss`` is a custom function of outputs ``(B, K)`` and targets that returns one loss per image, ``(B,)``;
    the mean over the batch is taken. B is the number of readable images of one process and one part of a batch, and
    may be 0.
    """

    main_metric: ClassVar[str] = "accuracy"  # larger is better
    has_accuracy: ClassVar[bool] = True
    loss: Loss | None

    @abstractmethod
    def check(self, name: str, targets: Tensor, outputs: int | None) -> None:
        """Raise ValueError unless all targets are of this kind and fit a network of ``outputs`` outputs."""

    @abstractmethod
    def default_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of each image if ``loss`` is None, ``(B,)``: 0 for unreadable images."""

    @abstractmethod
    def predict(self, outputs: Tensor) -> Tensor:
        """Convert outputs ``(B, K)`` to probabilities or values, ``(B, K)``."""

    @abstractmethod
    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, float]:
        """Compute the metrics of answers (see `answer`) for readable images, by name."""

    def answer(self, outputs: Tensor) -> Tensor:
        """Reduce outputs to the input of the metrics. Default: the result of `predict`."""
        return self.predict(outputs)

    @abstractmethod
    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return which images are predicted correctly, ``(B,)``."""

    def weights(self, targets: Tensor) -> Tensor | None:
        """Return the weight of each image in the mean loss, ``(B,)``, 0 for unreadable ones; None if all are 1."""
        return None

    def scale(self, targets: Tensor) -> Tensor:
        """Convert targets to what a loss compares outputs with."""
        return targets.float()

    def losses(self, outputs: Tensor, targets: Tensor, *, all_read: bool = False) -> Tensor:
        """Compute the loss of each image, ``(B,)``; unreadable images have none, or 0.

        Args:
            outputs: ``(B, K)``.
            targets: ``(B,)`` or ``(B, K)``.
            all_read: Whether the caller knows that all images are readable. Otherwise a custom loss waits for the
                device, to select the readable ones.

        Raises:
            ValueError: a custom loss does not return one number per image.
        """
        if self.loss is None:
            return self.default_losses(outputs, targets)
        if not all_read:
            read = is_read(targets)
            outputs, targets = outputs[read], targets[read]
        losses, expected = self.loss(outputs, self.scale(targets)), outputs.shape[:1]
        if not isinstance(losses, Tensor) or losses.shape != expected:
            came = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss returned {came}: expected one loss per image, shape {tuple(expected)}; "
                "torch's losses return that with reduction='none'"
            )
        return losses
