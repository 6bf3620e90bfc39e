"""Frozen, trainable and mode, all derived from `requires_grad`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from .layer_groups import LayerGroup, check_layer_groups

# torch and timm say ``running_mean``, Keras ``moving_variance``; others ``ema_mean``, ``avg_var``, ``std``.
_STATISTICS = frozenset({"running", "moving", "ema", "avg", "average", "mean", "var", "variance", "std"})


def set_trainable_groups(
    backbone: nn.Module,
    layer_groups: Sequence[LayerGroup],
    trainable_groups: int,
    unused_parameters: Iterable[str] = (),
) -> None:
    """Freeze a backbone but for its last layer groups.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> groups = (LayerGroup("0", ("0.weight", "0.bias")), LayerGroup("1", ("1.weight", "1.bias")))
    >>> set_trainable_groups(backbone, groups, 1)
    >>> [parameter.requires_grad for parameter in backbone.parameters()]
    [False, False, True, True]

    Parameters named in `unused_parameters` stay frozen in any group. Raises TypeError or ValueError for a
    `trainable_groups` that is no whole number of groups, and ValueError where the backbone has other parameters than
    its groups.
    """
    is_whole = not isinstance(trainable_groups, bool) and hasattr(trainable_groups, "__index__")
    if not is_whole or not 0 <= operator.index(trainable_groups) <= len(layer_groups):
        names = ", ".join(group.name for group in layer_groups)
        raise (ValueError if is_whole else TypeError)(
            f"trainable_groups={trainable_groups!r}: the backbone has {len(layer_groups)} layer groups "
            f"({names or 'none, as it has no parameters'}); pass {'' if is_whole else 'a whole number, '}0 to "
            f"{len(layer_groups)}."
        )
    trainable_groups = operator.index(trainable_groups)
    first_trainable = len(layer_groups) - trainable_groups
    parameters = check_layer_groups(backbone, layer_groups)
    off = set(unused_parameters)
    quantised = []
    for position, group in enumerate(layer_groups):
        for name in group.parameter_names:
            parameter = parameters[name]
            should_train = position >= first_trainable and name not in off
            parameter.requires_grad_(should_train and can_train(parameter))
            if should_train and parameter.is_floating_point() and not parameter.requires_grad:
                quantised.append(name)
    if quantised:
        names = f"{', '.join(quantised[:3])}{', ...' if len(quantised) > 3 else ''}"
        warnings.warn(
            f"{len(quantised)} quantised parameters ({names}) get no gradient and stay frozen; train adapters beside "
            "them (PEFT), or the network before it is quantised.",
            stacklevel=3,
        )


def can_train(parameter: torch.Tensor) -> bool:
    """Say whether a parameter can train: integers have no gradient, and quantised weights get none.

    >>> can_train(torch.zeros(2)), can_train(torch.zeros(2, dtype=torch.int8))
    (True, False)

    A quantised weight, as torchao's, is a subclass that says it is floating-point, and wraps values of another type.
    """
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return False
    if parameter.is_nested or hasattr(parameter, "to_local") or not hasattr(parameter, "__tensor_flatten__"):
        return True
    parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    return any(
        part is not None and part.dtype == parameter.dtype and part.numel() >= parameter.numel() and can_train(part)
        for part in parts
    )


def frozen_modules(
    model: nn.Module, backbone: nn.Module, layer_groups: Sequence[LayerGroup], *, norm_eval: bool = False
) -> Iterator[nn.Module]:
    """Yield the modules that belong in eval mode, each with all that is below it.

    >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    >>> list(frozen_modules(model, model[0], ()))
    [Linear(in_features=2, out_features=2, bias=True)]

    A module is frozen when its subtree has parameters and none of them trains. One without parameters follows its
    nearest ancestor that has some; directly under the root of the backbone it goes with the first layer group.
    With `norm_eval`, modules of the backbone that keep running statistics are in eval whatever trains. The model
    itself is never among them: its own flag is the mode that was asked for, for the day when something trains again.
    """
    parameters = dict(backbone.named_parameters())
    first_group = layer_groups[0].parameter_names if layer_groups else ()
    stem_trains = not layer_groups or any(parameters[name].requires_grad for name in first_group if name in parameters)
    everything = list(model.parameters())
    if everything and not any(parameter.requires_grad for parameter in everything):
        yield from model.children()
    for child in model.children():
        yield from _frozen_below(child, backbone, stem_trains=stem_trains)
    if norm_eval:
        yield from (module for module in backbone.modules() if keeps_running_statistics(module))


def _frozen_below(module: nn.Module, backbone: nn.Module, *, stem_trains: bool) -> Iterator[nn.Module]:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        if next(child.parameters(), None) is not None:
            yield from _frozen_below(child, backbone, stem_trains=stem_trains)
        elif module is backbone and parameters and not stem_trains:
            yield child


def keeps_running_statistics(module: nn.Module) -> bool:
    """Say whether a module is a normalisation that updates running statistics in train mode.

    >>> keeps_running_statistics(nn.BatchNorm1d(2)), keeps_running_statistics(nn.LayerNorm(2))
    (True, False)

    A layer of any library or of a user's own counts when one of its buffers is named for a statistic, and when it has
    no other layer inside but an activation: a whole network with such a buffer (``pixel_mean``) is no normalisation.
    """
    is_layer = all(parameter.ndim <= 1 for child in module.children() for parameter in child.parameters())
    return is_layer and any(
        buffer is not None and buffer.is_floating_point() and is_statistic(name)
        for name, buffer in module._buffers.items()
    )


def is_statistic(name: str) -> bool:
    """Say whether a buffer is named as running statistics are.

    >>> [is_statistic(name) for name in ("running_mean", "moving_variance", "num_batches_tracked", "pos_embed")]
    [True, True, True, False]
    """
    return name == "num_batches_tracked" or not _STATISTICS.isdisjoint(name.lower().split("_"))


def drop_frozen_gradients(model: nn.Module) -> None:
    """Forget the gradients of frozen parameters: with one left, momentum and weight decay would still move them.

    >>> import torch
    >>> layer = nn.Linear(2, 2)
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> drop_frozen_gradients(layer.requires_grad_(False))
    >>> layer.weight.grad is None
    True
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.grad = None
