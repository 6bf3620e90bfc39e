"""Measure the widths of features and logits on copies, and check that a classifier fits a backbone."""

from __future__ import annotations

import torch
from timm.models import get_model_input_config
from torch import nn

from ..features import describe_misfit, entry_width
from .copies import eval_copy, isolated, meta_copy


def measure_features(backbone: nn.Module) -> int | None:
    """Return the feature width of a timm backbone; None if its output is not (B, width).

    >>> import timm
    >>> measure_features(timm.create_model("mobilenetv3_small_050", num_classes=0)), measure_features(nn.Flatten())
    (1024, None)

    Measured with a forward pass on the meta device, so that a neck or a head in the backbone is included.
    """
    if not hasattr(backbone, "pretrained_cfg"):  # its input size is unknown
        return None
    try:
        with isolated(backbone):
            features = meta_copy(backbone)(probe(backbone, "meta"))
    except Exception:  # it may need other inputs, or an operator may not support the meta device
        return None
    return features.shape[1] if isinstance(features, torch.Tensor) and features.ndim == 2 else None


def count_classes(classifier: nn.Module, width: int | None = None) -> int | None:
    """Return the number of classes of a classifier; None if its output is not (B, num_classes).

    >>> count_classes(nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1))), count_classes(nn.ReLU())
    (3, None)

    Except for a linear layer, it is measured with a forward pass on the meta device.

    Args:
        classifier: takes features (B, width).
        width: the width of the features. Default: that of the first linear layer.
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
    except Exception:  # it may need other inputs, or an operator may not support the meta device
        return None
    return logits.shape[1] if isinstance(logits, torch.Tensor) and logits.ndim == 2 else None


def check_classifier_fits(classifier: nn.Module, features: object, origin: str) -> None:
    """Raise ValueError if a classifier cannot take these features.

    >>> check_classifier_fits(nn.Linear(3, 2), torch.zeros(1, 4), "from_timm")
    Traceback (most recent call last):
    ...
    ValueError: from_timm: the classifier (Linear) cannot take the backbone's features of shape (B, 4): ...
    """
    try:
        with isolated(classifier):
            eval_copy(classifier)(features)
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = describe_misfit(classifier, features) or f"{error}. Build it for the width of the features."
        shape = ", ".join(["B", *map(str, features.shape[1:])]) if isinstance(features, torch.Tensor) else "unknown"
        raise ValueError(
            f"{origin}: the classifier ({type(classifier).__name__}) cannot take the backbone's features of shape "
            f"({shape}): {reason}"
        ) from error


def probe(network: nn.Module, device: str | torch.device) -> torch.Tensor:
    """Return two random images of a network's input size, (2, C, H, W).

    >>> import timm
    >>> probe(timm.create_model("test_resnet"), "cpu").shape
    torch.Size([2, 3, 160, 160])
    """
    return torch.randn(2, *get_model_input_config(network)["input_size"], device=device, dtype=dtype_of(network))


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of a network's first floating-point parameter.

    >>> dtype_of(nn.Linear(2, 2).half())
    torch.float16
    """
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
