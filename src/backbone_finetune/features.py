"""Pass features from the backbone to the classifier, with errors that explain a mismatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def classify(classifier: nn.Module, features: Any) -> Any:
    """Classify features. If their kind, dtype or width does not match, raise ValueError with a remedy.

    >>> classify(nn.Linear(4, 2), [torch.zeros(1, 4)])
    Traceback (most recent call last):
    ...
    ValueError: FineTuneModel: the backbone returned a list of 1, and the classifier (Linear) takes one tensor; ...
    """
    try:
        return classifier(features)
    except (AttributeError, RuntimeError, TypeError) as error:
        if (reason := describe_misfit(classifier, features)) is None:
            raise
        raise ValueError(f"FineTuneModel: {reason}") from error


def describe_misfit(classifier: nn.Module, features: object) -> str | None:
    """Describe why a classifier failed on features; None if their kind, dtype and width match.

    >>> describe_misfit(nn.Linear(4, 2), {"map": torch.zeros(1, 4)})
    'the backbone returned a dict (map), and the classifier (Linear) takes one tensor; ...'
    >>> describe_misfit(nn.Linear(4, 2), torch.zeros(1, 4, dtype=torch.bfloat16))
    "the features are torch.bfloat16 and the classifier is torch.float32; ..."
    """
    kind = type(classifier).__name__
    if not isinstance(features, torch.Tensor):
        entries = ", ".join(map(str, features)) if isinstance(features, Mapping) else ""
        size = f" of {len(features)}" if isinstance(features, (list, tuple)) else ""
        return (
            f"the backbone returned a {type(features).__name__}{size}{f' ({entries})' if entries else ''}, and the "
            f"classifier ({kind}) takes one tensor; wrap the backbone in a module whose forward returns the tensor to "
            "classify (of a transformers model: outputs.pooler_output), or pass a classifier that takes what the "
            "backbone returns."
        )
    own = next((p.dtype for p in classifier.parameters() if p.is_floating_point()), features.dtype)
    if features.is_floating_point() and own != features.dtype and not torch.is_autocast_enabled(features.device.type):
        return (
            f"the features are {features.dtype} and the classifier is {own}; give both parts one dtype, "
            f"model.classifier.to({features.dtype}), or run the model in torch.autocast({features.device.type!r})."
        )
    width = entry_width(classifier)
    if width and features.shape[-1:] != (width,):
        shape = ", ".join(["B", *map(str, features.shape[1:])])
        return (
            f"the backbone returned features of shape ({shape}), and the classifier ({kind}) takes (B, {width}); pool "
            "the features at the end of the backbone, or build the classifier for their width."
        )
    return None


def entry_width(classifier: nn.Module) -> int | None:
    """Return the width of the features that a classifier takes; None if its first layer does not define it.

    >>> entry_width(nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2))), entry_width(nn.LazyLinear(2))
    (4, None)
    """
    while isinstance(classifier, nn.Sequential) and len(classifier):
        classifier = next(
            (part for part in classifier if not isinstance(part, (nn.Dropout, nn.Identity))), nn.Identity()
        )
    width = getattr(classifier, "in_features", 0)  # 0 if it is lazy
    return width if width and isinstance(width, int) else None


def detach_from_storage(features: Any) -> Any:
    """Copy features that are a view of a larger tensor, if no gradient flows into the backbone.

    >>> tokens = torch.zeros(8, 50, 16)
    >>> detach_from_storage(tokens[:, 0]).untyped_storage().nbytes() == 8 * 16 * 4
    True

    Autograd would otherwise keep the larger tensor until the backward pass: all tokens of a ViT for ``x[:, 0]``.
    """
    if not isinstance(features, torch.Tensor) or features.requires_grad or not torch.is_grad_enabled():
        return features
    if torch.compiler.is_compiling():  # the compiler decides what is kept
        return features
    try:
        is_small_view = features.untyped_storage().nbytes() >= 2 * features.nbytes
    except NotImplementedError:  # in torch.func's transforms, and for sparse tensors, there is no storage
        return features
    return features.clone(memory_format=torch.contiguous_format) if is_small_view else features
