"""Build optimizer groups from layer groups. Nothing is modified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from inspect import getattr_static
from numbers import Real
from typing import Any, cast

import torch
from torch import nn

from .discovery import Names, find_timm_network
from .groups import LayerGroup, check_layer_groups, layer_depths


def build_param_groups(
    backbone: nn.Module,
    classifier: nn.Module,
    layer_groups: Sequence[LayerGroup],
    *,
    lr: float | torch.Tensor,
    backbone_lr: float | torch.Tensor | None,
    weight_decay: float,
    layer_decay: float | None,
    include_frozen: bool,
) -> list[dict[str, Any]]:
    """Group the trainable parameters by part, depth and weight decay.

    >>> groups = build_param_groups(
    ...     nn.Linear(2, 2), nn.Linear(2, 2), [LayerGroup("(root)", ("weight", "bias"))], lr=0.1, backbone_lr=None,
    ...     weight_decay=0.05, layer_decay=0.5, include_frozen=False)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]  # doctest: +NORMALIZE_WHITESPACE
    [('backbone.0', 0.05, 0.05), ('backbone.0.no_decay', 0.05, 0.0),
     ('classifier', 0.1, 0.05), ('classifier.no_decay', 0.1, 0.0)]

    Biases, 1-d weights and the names in the network's ``no_weight_decay()`` (fnmatch patterns, as in timm) do not
    decay. With ``layer_decay``, the learning rate of a backbone parameter at depth d is rate * layer_decay **
    (classifier_depth - d), as in BEiT and ``timm.optim.param_groups_layer_decay``.

    Args: see ``FineTuneModel.param_groups``.

    Returns:
        Groups with ``name``, absolute ``lr`` (if given as a tensor, a separate one per group), ``weight_decay``,
        ``params`` and ``param_names``.

    Raises:
        ValueError: no parameter trains, a rate is negative, or the backbone gained or lost parameters.
    """
    _check_rates(lr=lr, backbone_lr=backbone_lr, weight_decay=weight_decay, layer_decay=layer_decay)
    depths, classifier_depth = layer_depths(backbone, layer_groups)
    no_weight_decay = exempt_names(backbone)
    groups: dict[str, dict[str, Any]] = {}
    parts = (
        ("backbone", backbone.named_parameters(), lr if backbone_lr is None else backbone_lr),
        ("classifier", classifier.named_parameters(), lr),
    )
    for part, parameters, part_lr in parts:
        for name, parameter in parameters:
            if not (parameter.requires_grad or include_frozen):
                continue
            is_exempt = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias"
            if part == "backbone":
                is_exempt = is_exempt or any(fnmatch(name, pattern) for pattern in no_weight_decay)
            decays = weight_decay > 0 and not is_exempt
            title, rate = part, part_lr
            if layer_decay is not None and part == "backbone":
                title += f".{depths[name]}"
                rate = rate * layer_decay ** (classifier_depth - depths[name])
            if weight_decay > 0 and not decays:
                title += ".no_decay"
            if title not in groups:
                # A separate tensor for each group: optimizers and schedulers change it in place.
                rate = rate.clone() if isinstance(rate, torch.Tensor) else rate
                groups[title] = {"name": title, "lr": rate, "weight_decay": weight_decay * decays}
                groups[title] |= {"params": [], "param_names": []}
            groups[title]["params"].append(parameter)
            groups[title]["param_names"].append(f"{part}.{name}")
    if not groups:
        raise ValueError(
            "param_groups: no parameter trains; unfreeze some first "
            "(unfreeze_backbone(), freeze_backbone(trainable_groups=1), classifier.requires_grad_(True))."
        )
    return list(groups.values())


def build_group_matcher(
    backbone: nn.Module, layer_groups: Sequence[LayerGroup], *, coarse: bool
) -> Callable[[str], int]:
    """Return a function from a parameter name of a FineTuneModel to its depth, for timm's optimizer factory.

    >>> backbone = nn.Sequential(nn.Linear(2, 2))
    >>> depth_of = build_group_matcher(backbone, [LayerGroup("0", ("0.weight", "0.bias"))], coarse=True)
    >>> depth_of("backbone.0.weight"), depth_of("classifier.weight")
    (0, 1)

    The function raises ValueError for a name that is neither in the backbone nor in the classifier.
    """
    if coarse:
        check_layer_groups(backbone, layer_groups)
        depths = {name: depth for depth, group in enumerate(layer_groups) for name in group.parameter_names}
        classifier_depth = len(layer_groups)
    else:
        depths, classifier_depth = layer_depths(backbone, layer_groups)

    for first, aliases in Names(backbone).aliases.items():  # a tied parameter is found by any of its names
        depths |= dict.fromkeys(aliases, depths[first])

    def depth_of(name: str) -> int:
        part, _, rest = name.partition(".")
        if part == "classifier":
            return classifier_depth
        if part != "backbone" or rest not in depths:
            raise ValueError(
                f"group_matcher: {name!r} is not a parameter of this FineTuneModel, whose names begin with 'backbone.' "
                "and 'classifier.'; build the optimizer from the model itself, before it is compiled or wrapped."
            )
        return depths[rest]

    return depth_of


def exempt_names(backbone: nn.Module) -> set[str]:
    """Return a timm network's ``no_weight_decay()`` names, also if it is inside an adapter or a wrapper.

    >>> import timm
    >>> sorted(exempt_names(nn.Sequential(timm.create_model("test_vit"))))
    ['0.cls_token', '0.dist_token', '0.pos_embed', '0.reg_token']
    """
    prefix, network = find_timm_network(backbone)
    if getattr_static(network, "no_weight_decay", None) is None:
        return set()
    return {f"{prefix}{name}" for name in cast(Any, network).no_weight_decay()}


def _check_rates(**rates: float | torch.Tensor | None) -> None:
    for name, rate in rates.items():
        if rate is None and name in {"backbone_lr", "layer_decay"}:
            continue
        if isinstance(rate, torch.Tensor) and rate.numel() != 1:
            raise ValueError(
                f"param_groups: {name} is a tensor of shape {tuple(rate.shape)}; pass one finite number, 0 or more, as "
                "a float or as a tensor with one element."
            )
        if not isinstance(rate, (Real, torch.Tensor)) or not 0 <= rate < float("inf"):
            raise ValueError(f"param_groups: {name}={rate!r}; pass a finite number, 0 or more.")
