"""Classifiers with two heads, and dropout before a classifier."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from .copies import shallow_copy


class DistilledClassifier(nn.Module):
    """Two heads on one embedding, as in timm's levit, swiftformer, efficientformer and efficientformer_v2.

    >>> DistilledClassifier(nn.Linear(4, 2), nn.Linear(4, 2))(torch.zeros(8, 4)).shape
    torch.Size([8, 2])

    Maps features (B, num_features) to the mean of both logits, (B, num_classes). In train mode after
    ``set_distilled_training()``, returns both logits as a tuple.
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


class _Dropout:
    """A forward pre-hook: dropout of the input of a module while that module is in train mode."""

    def __init__(self, drop_rate: float) -> None:
        self.drop_rate = drop_rate

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *others = inputs
        return (nn.functional.dropout(features, self.drop_rate, module.training), *others)


def add_dropout(classifier: nn.Module, drop_rate: float) -> None:
    """Add dropout before a classifier, which keeps its class and its state-dict keys.

    >>> classifier = nn.Linear(4, 2)
    >>> add_dropout(classifier, 0.2)
    >>> classifier, list(classifier.state_dict())
    (Linear(in_features=4, out_features=2, bias=True), ['weight', 'bias'])

    Like ``torch.nn.utils.prune``, this registers a forward pre-hook, which copies, pickles and graphs include. It is
    active while the classifier is in train mode. A dropout that was added earlier is replaced.
    """
    for key in _added_to(classifier):
        del classifier._forward_pre_hooks[key]
    classifier.register_forward_pre_hook(_Dropout(drop_rate))


def without_dropout(classifier: nn.Module) -> nn.Module:
    """Return a classifier without the dropout of ``add_dropout``: itself, or a copy that shares its parameters.

    >>> classifier = nn.Linear(4, 2)
    >>> add_dropout(classifier, 0.2)
    >>> plain = without_dropout(classifier)
    >>> plain._forward_pre_hooks, plain.weight is classifier.weight, len(classifier._forward_pre_hooks)
    (OrderedDict(), True, 1)
    """
    added = _added_to(classifier)
    if not added:
        return classifier
    plain = shallow_copy(classifier)
    for key in added:
        del plain._forward_pre_hooks[key]
    return plain


def _added_to(classifier: nn.Module) -> list[int]:
    return [key for key, hook in classifier._forward_pre_hooks.items() if isinstance(hook, _Dropout)]
