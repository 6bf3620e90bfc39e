"""Which modules are frozen and in eval mode, derived from ``requires_grad`` alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from .layers.groups import LayerGroup

# torch and timm say ``running_mean``, Keras ``moving_variance``; others ``ema_mean``, ``avg_var``, ``std``.
_STATISTICS = frozenset({"running", "moving", "ema", "avg", "average", "mean", "var", "variance", "std"})


def frozen_modules(
    model: nn.Module, backbone: nn.Module, layer_groups: Sequence[LayerGroup], *, norm_eval: bool = False
) -> Iterator[nn.Module]:
    """Yield the modules that must be in eval mode, each including its submodules.

    >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    >>> list(frozen_modules(model, model[0], ()))
    [Linear(in_features=2, out_features=2, bias=True)]

    A module is frozen if it has parameters, its own or its submodules', and none of them trains. A module without
    parameters follows its nearest ancestor with parameters; directly under the root of the backbone it follows the
    first layer group. With ``norm_eval``, modules of the backbone that keep running statistics are always in eval mode.
    The model itself is never yielded: its own flag keeps the mode that was set, for when parameters train again.
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
    """Return whether a module is a normalization layer that updates running statistics in train mode.

    >>> keeps_running_statistics(nn.BatchNorm1d(2)), keeps_running_statistics(nn.LayerNorm(2))
    (True, False)

    A layer of any library counts if one of its buffers is named after a statistic and it contains no layer other than
    an activation. A whole network with such a buffer (``pixel_mean``) does not count.
    """
    is_layer = all(parameter.ndim <= 1 for child in module.children() for parameter in child.parameters())
    return is_layer and any(
        buffer is not None and buffer.is_floating_point() and is_statistic(name)
        for name, buffer in module._buffers.items()
    )


def is_statistic(name: str) -> bool:
    """Return whether a buffer has the name of a running statistic.

    >>> [is_statistic(name) for name in ("running_mean", "moving_variance", "num_batches_tracked", "pos_embed")]
    [True, True, True, False]
    """
    return name == "num_batches_tracked" or not _STATISTICS.isdisjoint(name.lower().split("_"))


def drop_frozen_gradients(model: nn.Module) -> None:
    """Drop the gradients of frozen parameters: an optimizer would still update a parameter with a stale gradient.

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
