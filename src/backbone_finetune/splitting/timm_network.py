"""Split a timm network into backbone and classifier with timm's ``reset_classifier``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from ..validation import check_architecture, check_drop_rate, check_network
from .copies import eval_copy, isolated, meta_copy
from .custom import Split
from .heads import add_dropout
from .measures import check_classifier_fits, probe
from .timm_head import fresh_classifier, locate_head, own_classifier

_WRITE_IT = "wrap it yourself: FineTuneModel(backbone, classifier), with pooling at the end of the backbone"


def split_timm(
    model: str | nn.Module,
    num_classes: int | None,
    *,
    classifier: nn.Module | Callable[[int], nn.Module] | None,
    pretrained: bool,
    drop_rate: float | None,
    create_model_kwargs: dict[str, Any],
) -> Split:
    """Build or take a timm network, remove its classifier, and choose the new classifier.

    >>> split = split_timm("resnet18", 10, classifier=None, pretrained=False, drop_rate=None, create_model_kwargs={})
    >>> split.classifier, split.backbone.fc
    (Linear(in_features=512, out_features=10, bias=True), Identity())

    Args: see ``FineTuneModel.from_timm``.

    Raises:
        ValueError: it cannot be split. A given network is then unchanged.
    """
    if num_classes is not None and classifier is not None:
        raise ValueError("from_timm: num_classes and classifier were both given; pass one of them.")
    if num_classes is not None:
        if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__") or num_classes < 1:
            raise ValueError(
                f"from_timm: num_classes={num_classes!r}; pass an integer from 1, or leave it out to keep the "
                "network's own classifier."
            )
        num_classes = operator.index(num_classes)
    check_drop_rate(drop_rate)
    check_network(model)
    if isinstance(model, str):
        network = _create(model, num_classes, pretrained, drop_rate, create_model_kwargs)
    else:
        network = model
        _check_no_arguments_beside_module(pretrained, drop_rate, create_model_kwargs)
    _check_has_classifier(network)

    headless: Any = meta_copy(network)
    unused_parameters = _unused_after_reset(headless)
    width = _measure_width(network, headless)
    chosen: nn.Module
    if num_classes is None and classifier is None:
        chosen, reassembly = own_classifier(network, headless)
    else:
        headed = meta_copy(network)
        headed.reset_classifier(num_classes or 2)
        reassembly = locate_head(headed, headless)
        if num_classes is not None:
            has_pretrained_one = pretrained and network.pretrained_cfg["num_classes"] == num_classes
            has_loaded_one = bool(create_model_kwargs.get("checkpoint_path"))
            if has_pretrained_one or has_loaded_one or isinstance(model, nn.Module):
                network.reset_classifier(num_classes)
            chosen = fresh_classifier(network, reassembly, width, num_classes)
        else:
            assert classifier is not None
            chosen = classifier if isinstance(classifier, nn.Module) else _call(classifier, width)
    example = next(network.parameters())
    check_classifier_fits(chosen, torch.zeros(2, width, device=example.device, dtype=example.dtype), "from_timm")
    network.reset_classifier(0)
    if getattr(network, "distilled_training", False):  # otherwise it returns its features twice
        network.set_distilled_training(False)
    if drop_rate:
        add_dropout(chosen, drop_rate)
    return Split(network, chosen, reassembly._replace(unused_parameters=unused_parameters))


def _create(
    name: str, num_classes: int | None, pretrained: bool, drop_rate: float | None, create_model_kwargs: dict[str, Any]
) -> Any:
    if ":" not in name:  # otherwise timm finds it on the hub or in a folder
        check_architecture(name)
    if create_model_kwargs.get("features_only"):
        raise ValueError(f"from_timm: features_only=True returns feature maps, not one vector per image; {_WRITE_IT}.")
    if create_model_kwargs.get("global_pool") == "":
        raise ValueError(f"from_timm: global_pool='' leaves the features unpooled; leave it out, or {_WRITE_IT}.")
    if num_classes is not None:
        create_model_kwargs = {**create_model_kwargs, "num_classes": num_classes}
    if drop_rate is not None:
        create_model_kwargs = {**create_model_kwargs, "drop_rate": 0.0}
    try:
        return timm.create_model(name, pretrained=pretrained, **create_model_kwargs)
    except RuntimeError as error:
        if num_classes is None or not create_model_kwargs.get("checkpoint_path"):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"from_timm: the checkpoint does not fit {name} with num_classes={num_classes} ({reason}); build the "
            "network with the checkpoint's own number of classes, network = timm.create_model(name, num_classes=..., "
            f"checkpoint_path=...), and replace its classifier: from_timm(network, num_classes={num_classes})."
        ) from error


def _check_no_arguments_beside_module(
    pretrained: bool, drop_rate: float | None, create_model_kwargs: dict[str, Any]
) -> None:
    beside = [*create_model_kwargs, *["pretrained"] * pretrained, *["drop_rate"] * (drop_rate is not None)]
    if beside:
        raise ValueError(
            f"from_timm: {', '.join(beside)} and a network were both given; pass these to timm.create_model, or pass "
            "the architecture's name (for dropout: classifier=lambda width: nn.Sequential(nn.Dropout(0.2), "
            "nn.Linear(width, num_classes)))."
        )


def _check_has_classifier(network: nn.Module) -> None:
    if not (hasattr(network, "reset_classifier") and hasattr(network, "get_classifier")):
        raise ValueError(
            f"from_timm: {type(network).__name__} has no classifier to take off (no reset_classifier: an encoder, a "
            f"features_only model, or not a timm network); use FineTuneModel.from_module(net, net.fc), or {_WRITE_IT}."
        )


def _measure_width(network: Any, headless: nn.Module) -> int:
    features: object
    try:
        features = headless(probe(network, "meta"))
    except RuntimeError:  # an operator may not support the meta device; a real error is raised again here
        twin: Any = eval_copy(network)
        twin.reset_classifier(0)
        with isolated(network):
            features = twin(probe(network, next(network.parameters()).device))
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        got = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"from_timm: without its classifier {type(network).__name__} returns {got}, not (B, width): it does not "
            f"pool (global_pool=''); build it with pooling, or {_WRITE_IT}."
        )
    return features.shape[1]


def _unused_after_reset(twin: Any) -> frozenset[str]:
    """Remove the classifier and return what that freezes because it is unused then (efficientvim's ``weights``)."""
    able = {name for name, p in twin.named_parameters() if p.is_floating_point() or p.is_complex()}
    for name in able:
        twin.get_parameter(name).requires_grad = True  # a lazy parameter has no `requires_grad_`
    try:
        twin.reset_classifier(0)
    except AttributeError as error:  # the user has replaced timm's head
        raise ValueError(
            f"from_timm: reset_classifier of {type(twin).__name__} fails on its present classifier ({error}); "
            "use FineTuneModel.from_module(net, net.head), with the module that is its classifier."
        ) from error
    return frozenset(name for name, p in twin.named_parameters() if name in able and not p.requires_grad)


def _call(build: Callable[[int], nn.Module], width: int) -> nn.Module:
    if not callable(build):
        raise TypeError(
            f"from_timm: classifier={build!r}; pass a module, or a function from the feature width to a module."
        )
    classifier = build(width)
    if not isinstance(classifier, nn.Module):
        raise TypeError(
            f"from_timm: classifier({width}) returned a {type(classifier).__name__}; pass a module, or a function from "
            "the feature width to a module."
        )
    return classifier
