"""Frozen, trainable and mode, all derived from `requires_grad`."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .layer_groups import LayerGroup, check_layer_groups
from .tensor_parts import shared_memory

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
    for position, group in enumerate(layer_groups):
        for name in group.parameter_names:
            parameter = parameters[name]
            parameter.requires_grad_(position >= first_trainable and name not in off and can_train(parameter))


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


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Give each parameter back its `requires_grad` when the block raises.

    >>> layer = nn.Linear(2, 2)
    >>> with restored_on_error(layer):
    ...     _ = layer.requires_grad_(False)
    >>> layer.weight.requires_grad
    False
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parameter, required in before:
            parameter.requires_grad = required
        raise


def check_shares_no_memory(model: nn.Module) -> None:
    """Raise ValueError when a frozen parameter shares its memory with one that trains, and would move with it.

    >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    >>> model[0].weight.data = model[1].weight.data
    >>> check_shares_no_memory(model)
    Traceback (most recent call last):
    ...
    ValueError: freezing: 0.weight would be frozen, and shares memory with 1.weight, which trains; ...
    """
    for frozen, trainable in shared_memory(model.named_parameters()):
        raise ValueError(
            f"freezing: {frozen} would be frozen, and shares memory with {trainable}, which trains; tie them as one "
            "parameter (b.weight = a.weight), or give one a copy (b.weight.data = a.weight.data.clone())."
        )


def warn_of_shared_modes(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Warn of a module without parameters that depends on its mode, and stands in a frozen and a trainable place.

    >>> dropout = nn.Dropout()
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), dropout), nn.Sequential(nn.Linear(2, 2), dropout))
    >>> warn_of_shared_modes(model, [])

    One object has one mode, which is eval then: dropout is off where things train.
    """
    places: dict[int, tuple[nn.Module, list[str], list[str]]] = {}
    for path, module, is_frozen in _places(model, "", {id(module) for module in frozen}, is_frozen=False):
        if next(module.parameters(), None) is None and _depends_on_mode(module):
            _, in_frozen, in_trainable = places.setdefault(id(module), (module, [], []))
            (in_frozen if is_frozen else in_trainable).append(path)
    for module, in_frozen, in_trainable in places.values():
        if in_frozen and in_trainable:
            warnings.warn(
                f"one {type(module).__name__} object stands in {in_frozen[0]}, which is frozen, and in "
                f"{in_trainable[0]}, which trains; it is in eval in both, and so off where things train. Give each "
                "place an object of its own.",
                stacklevel=3,
            )


def _places(
    module: nn.Module, path: str, frozen: Collection[int], *, is_frozen: bool
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Each place of each module, one that stands in several several times, and whether something frozen is above it."""
    is_frozen = is_frozen or id(module) in frozen
    yield path, module, is_frozen
    for name, child in module._modules.items():
        if child is not None:
            yield from _places(child, f"{path}.{name}" if path else name, frozen, is_frozen=is_frozen)


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module's forward reads its mode, and its rate, as dropouts name it, is not 0."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return code is not None and "training" in code.co_names and rate != 0


def padded_encoders(model: nn.Module, before: Iterable[nn.TransformerEncoder] = ()) -> list[nn.TransformerEncoder]:
    """Keep from nested tensors, and list, the encoders whose first layer is frozen below a layer that trains.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(2, 2, 2, batch_first=True), 2)
    >>> _ = encoder.layers[0].requires_grad_(False)
    >>> padded_encoders(encoder) == [encoder], encoder.use_nested_tensor
    (True, False)

    `nn.TransformerEncoder` asks its first layer alone whether nested tensors can replace a padding mask, and layers
    that train refuse them. Those of `before` that it no longer holds for get them back.
    """
    for encoder in before:
        encoder.use_nested_tensor = True
    padded = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and not any(parameter.requires_grad for parameter in module.layers.get_submodule("0").parameters())
        and any(parameter.requires_grad for parameter in module.layers.parameters())
    ]
    for encoder in padded:
        encoder.use_nested_tensor = False
    return padded
