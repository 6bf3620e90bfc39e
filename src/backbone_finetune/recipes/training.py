"""The training loop: plain and short, on features where the backbone is frozen, on pictures where it is not."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel

from .backbone_pass import trains
from .features import extract_features

__all__ = ["EpochResult", "Hyperparameters", "evaluate", "fine_tune", "fit"]


@dataclass(frozen=True)
class Hyperparameters:
    """How to train. The backbone's learning rate counts only where ``trainable_groups`` lets some of it train.

    >>> Hyperparameters(epochs=5).lr
    0.001
    """

    epochs: int = 30
    batch_size: int = 32
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class EpochResult:
    """One epoch: mean loss and accuracy while training, accuracy on the held-out pictures after it.

    >>> EpochResult(epoch=1, train_loss=2.1, train_accuracy=0.2, test_accuracy=0.3).epoch
    1
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    test_accuracy: float


@torch.no_grad()
def evaluate(module: nn.Module, data: Dataset[Any], *, batch_size: int, device: torch.device) -> float:
    """The share of inputs whose largest logit is their target, 0 to 1. Leaves the module in eval mode.

    >>> evaluate(nn.Identity(), [(torch.tensor([0.0, 1.0]), 1)], batch_size=1, device=torch.device("cpu"))
    1.0
    """
    module.eval()
    correct = total = 0
    for inputs, targets in DataLoader(data, batch_size):
        correct += int((module(inputs.to(device)).argmax(-1).cpu() == targets).sum())
        total += len(targets)
    return correct / total


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Dataset[Any],
    test: Dataset[Any],
    hyperparameters: Hyperparameters,
    *,
    device: torch.device,
    show_progress: bool = True,
) -> list[EpochResult]:
    """Train a module on ``(input, target)`` pairs with cross entropy, and evaluate it after each epoch.

    What trains is what the optimizer holds. The test data is looked at and never learnt from, nor chosen by.

    >>> head, data = nn.Linear(2, 2), [(torch.eye(2)[target], target) for target in (0, 1)]
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    >>> history = fit(
    ...     head, optimizer, data, data, Hyperparameters(epochs=9), device=torch.device("cpu"), show_progress=False
    ... )
    >>> history[-1].test_accuracy
    1.0
    """
    generator = torch.Generator().manual_seed(hyperparameters.seed)
    size = len(train)  # type: ignore[arg-type]  # torch's Dataset declares no length; those used here have one
    # BatchNorm cannot train on a batch of one, so a last picture left alone sits this epoch out (another one the next).
    batches = DataLoader(
        train,
        hyperparameters.batch_size,
        shuffle=True,
        generator=generator,
        drop_last=size % hyperparameters.batch_size == 1 < size,
    )
    history: list[EpochResult] = []
    for epoch in range(1, hyperparameters.epochs + 1):
        module.train()
        loss_sum, correct, seen = 0.0, 0, 0
        title = f"epoch {epoch}/{hyperparameters.epochs}"
        with tqdm(total=len(batches), desc=title, unit="batch", disable=not show_progress) as bar:
            for batch in batches:
                inputs, targets = (tensor.to(device) for tensor in batch)
                logits: Tensor = module(inputs)
                loss = cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loss_sum += loss.item() * len(targets)
                correct += int((logits.argmax(-1) == targets).sum())
                seen += len(targets)
                bar.update()
            test_accuracy = evaluate(module, test, batch_size=hyperparameters.batch_size, device=device)
            history.append(EpochResult(epoch, loss_sum / seen, correct / seen, test_accuracy))
            bar.set_postfix(loss=f"{loss_sum / seen:.3f}", train=f"{correct / seen:.3f}", test=f"{test_accuracy:.3f}")
    return history


def fine_tune(
    model: FineTuneModel,
    train: Dataset[tuple[Tensor, int]],
    test: Dataset[tuple[Tensor, int]],
    hyperparameters: Hyperparameters,
    *,
    device: torch.device,
    show_progress: bool = True,
) -> list[EpochResult]:
    """Train what is trainable in a model, and prove that the rest did not move.

    With the whole backbone frozen, it runs once over the pictures and the classifier trains on its features; otherwise
    the whole model runs in every step. Frozen parameters and buffers are compared bit for bit before and after.

    >>> model = FineTuneModel(nn.Linear(2, 3), nn.Linear(3, 2)).freeze_backbone()
    >>> pictures = [(torch.eye(2)[target], target) for target in (0, 1)]
    >>> settings = Hyperparameters(epochs=2)
    >>> len(fine_tune(model, pictures, pictures, settings, device=torch.device("cpu"), show_progress=False))
    2

    Raises:
        AssertionError: a frozen parameter or buffer changed.
        ValueError: nothing trains.
    """
    model.to(device)
    groups = model.param_groups(
        hyperparameters.lr, backbone_lr=hyperparameters.backbone_lr, weight_decay=hyperparameters.weight_decay
    )
    optimizer = torch.optim.AdamW([dict(group) for group in groups])
    with model.assert_frozen():
        if trains(model.backbone):
            return fit(model, optimizer, train, test, hyperparameters, device=device, show_progress=show_progress)
        train_features, test_features = (
            extract_features(
                model,
                DataLoader(pictures, hyperparameters.batch_size),
                device=device,
                title=title if show_progress else None,
            )
            for pictures, title in ((train, "features, train"), (test, "features, test"))
        )
        return fit(
            model.classifier,
            optimizer,
            train_features,
            test_features,
            hyperparameters,
            device=device,
            show_progress=show_progress,
        )
