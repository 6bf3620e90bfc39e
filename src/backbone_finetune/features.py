"""Features on their way from the backbone to the classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def classify(classifier: nn.Module, features: Any) -> Any:
    """Classify features; where that fails for what they are, say what came and what to do.

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
    """Say why a classifier failed on features and what to do, None where it is not for their kind, dtype or width.

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
            f"classifier ({kind}) takes one tensor; wrap the backbone in a module whose forward returns the one that "
            "is to be classified (of a transformers model: outputs.pooler_output), or pass a classifier that takes "
            "what the backbone returns."
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
            f"the backbone gives features of shape ({shape}), and the classifier ({kind}) takes (B, {width}); pool the "
            "features at the end of the backbone, or build the classifier for their width."
        )
    return None


def entry_width(classifier: nn.Module) -> int | None:
    """Give how wide the features are that a classifier takes, None where its first layer does not say.

    >>> entry_width(nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 2))), entry_width(nn.LazyLinear(2))
    (4, None)
    """
    while isinstance(classifier, nn.Sequential) and len(classifier):
        classifier = next(
            (part for part in classifier if not isinstance(part, (nn.Dropout, nn.Identity))), nn.Identity()
        )
    width = getattr(classifier, "in_features", 0)  # 0 where it is lazy
    return width if width and isinstance(width, int) else None


def detach_from_storage(features: Any) -> Any:
    """Free the features from a larger tensor that they are a view of, where only the classifier needs a gradient.

    >>> tokens = torch.zeros(8, 50, 16)
    >>> detach_from_storage(tokens[:, 0]).untyped_storage().nbytes() == 8 * 16 * 4
    True

    A ViT's ``x[:, 0]`` would keep every token alive until the backward pass.
    """
    if not isinstance(features, torch.Tensor) or features.requires_grad or not torch.is_grad_enabled():
        return features
    if torch.compiler.is_compiling():  # the compiler decides itself what is kept
        return features
    try:
        is_small_view = features.untyped_storage().nbytes() >= 2 * features.nbytes
    except NotImplementedError:  # inside torch.func's transforms, and for sparse tensors: there is none to look at
        return features
    return features.clone(memory_format=torch.contiguous_format) if is_small_view else features
