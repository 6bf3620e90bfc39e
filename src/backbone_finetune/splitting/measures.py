"""Widths of features and logits, measured on copies, and whether a classifier fits a backbone."""

from __future__ import annotations

import torch
from timm.models import get_model_input_config
from torch import nn

from ..features import describe_misfit, entry_width
from .copies import eval_copy, isolated, meta_copy


def measure_features(backbone: nn.Module) -> int | None:
    """Measure how wide the features of a timm backbone are, None where it gives no (B, width) for an image.

    >>> import timm
    >>> measure_features(timm.create_model("mobilenetv3_small_050", num_classes=0)), measure_features(nn.Flatten())
    (1024, None)

    It runs on the meta device, so that a neck or a head in the backbone counts.
    """
    if not hasattr(backbone, "pretrained_cfg"):  # what it takes is not known
        return None
    try:
        with isolated(backbone):
            features = meta_copy(backbone)(probe(backbone, "meta"))
    except Exception:  # it may take more than images, or have no shapes without values
        return None
    return features.shape[1] if isinstance(features, torch.Tensor) and features.ndim == 2 else None


def count_classes(classifier: nn.Module, width: int | None = None) -> int | None:
    """Count the classes that a classifier tells apart, None where it gives no (B, num_classes).

    >>> count_classes(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1))), count_classes(nn.ReLU())
    (3, None)

    Other than of a linear layer, they are measured on the meta device, for features of that `width` or, where it is
    not known, as wide as the first linear layer takes them.
    """
    if isinstance(classifier, nn.Linear):
        return classifier.out_features
    if next(classifier.parameters(), None) is None:
        return None
    for part in classifier.modules():
        width = width or entry_width(part)
    if width is None:
        return None
    try:
        with isolated(classifier):
            twin = meta_copy(classifier)
            logits = twin(torch.empty(2, width, device="meta", dtype=dtype_of(classifier)))
    except Exception:  # it may take more than one vector, or have no shapes without values
        return None
    return logits.shape[1] if isinstance(logits, torch.Tensor) and logits.ndim == 2 else None


def check_width(backbone: nn.Module, classifier: nn.Module) -> None:
    """Raise ValueError for a linear classifier that a timm backbone does not fit, where both say their width.

    >>> import timm
    >>> check_width(timm.create_model("test_resnet", num_classes=0), nn.Linear(3, 2))
    Traceback (most recent call last):
    ...
    ValueError: FineTuneModel: the classifier takes 3 features, and ResNet gives 96; ...
    """
    said = getattr(backbone, "head_hidden_size", None)
    if not isinstance(classifier, nn.Linear) or not isinstance(said, int) or classifier.in_features in {0, said}:
        return  # 0 is a lazy one's, which takes what it is given
    # A backbone that the user has changed may give something else than it says, so that it is measured.
    width = measure_features(backbone)
    if width is not None and width != classifier.in_features:
        raise ValueError(
            f"FineTuneModel: the classifier takes {classifier.in_features} features, and {type(backbone).__name__} "
            f"gives {width}; build it as nn.Linear({width}, num_classes), from timm's "
            f"backbone.head_hidden_size ({said})."
        )


def check_classifier_fits(classifier: nn.Module, features: object, origin: str) -> None:
    """Raise ValueError when a classifier cannot take these features.

    >>> check_classifier_fits(nn.Linear(3, 2), torch.zeros(1, 4), "from_timm")
    Traceback (most recent call last):
    ...
    ValueError: from_timm: the classifier (Linear) cannot take the backbone's features of shape (B, 4): ...
    """
    try:
        with isolated(classifier):
            eval_copy(classifier)(features)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = describe_misfit(classifier, features) or f"{error}. Size it for what the backbone gives."
        shape = ", ".join(["B", *map(str, features.shape[1:])]) if isinstance(features, torch.Tensor) else "unknown"
        raise ValueError(
            f"{origin}: the classifier ({type(classifier).__name__}) cannot take the backbone's features of shape "
            f"({shape}): {reason}"
        ) from error


def probe(network: nn.Module, device: str | torch.device) -> torch.Tensor:
    """Draw two images of the size that a network is built for.

    >>> import timm
    >>> probe(timm.create_model("test_resnet"), "cpu").shape
    torch.Size([2, 3, 160, 160])
    """
    return torch.randn(2, *get_model_input_config(network)["input_size"], device=device, dtype=dtype_of(network))


def dtype_of(network: nn.Module) -> torch.dtype:
    """Give the precision that a network computes in.

    >>> dtype_of(nn.Linear(2, 2).half())
    torch.float16
    """
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
