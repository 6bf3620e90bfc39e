"""Classifiers that are more than one layer, and how many classes a classifier tells apart."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


class DistilledClassifier(nn.Module):
    """Two heads on one embedding, as in timm's levit, swiftformer, efficientformer and efficientformer_v2.

    >>> DistilledClassifier(nn.Linear(4, 2), nn.Linear(4, 2))(torch.zeros(8, 4)).shape
    torch.Size([8, 2])

    Their mean, or both as a tuple when training after `set_distilled_training()`: (B, C) -> (B, num_classes).
    """

    def __init__(self, head: nn.Module, head_dist: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.head_dist = head_dist
        self.distilled_training = False

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both heads' logits in train mode."""
        self.distilled_training = enable

    def forward(self, features: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Classify features."""
        logits, distilled = self.head(features), self.head_dist(features)
        if self.distilled_training and self.training:
            return logits, distilled
        return cast(torch.Tensor, (logits + distilled) / 2)


class DropoutClassifier(nn.Module):
    """A classifier behind dropout, which lives on above a frozen backbone.

    >>> DropoutClassifier(0.2, nn.Linear(4, 2))(torch.zeros(8, 4)).shape
    torch.Size([8, 2])
    """

    def __init__(self, drop_rate: float, classifier: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = classifier

    def forward(self, features: torch.Tensor) -> Any:
        """Drop features, then classify them."""
        return self.classifier(self.dropout(features))


def count_classes(classifier: nn.Module) -> int | None:
    """Read off how many classes a classifier tells apart, None where it does not say.

    >>> count_classes(nn.Sequential(nn.ReLU(), nn.Linear(4, 3))), count_classes(nn.ReLU())
    (3, None)
    """
    if isinstance(classifier, DropoutClassifier):
        return count_classes(classifier.classifier)
    if isinstance(classifier, DistilledClassifier):
        return count_classes(classifier.head)
    if isinstance(classifier, nn.Sequential) and len(classifier):
        return count_classes(classifier[-1])
    said = getattr(classifier, "num_classes", getattr(classifier, "out_features", None))
    return said if isinstance(said, int) else None
