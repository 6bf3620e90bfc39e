"""Choose which parameters of a backbone train: those of its last layer groups, or of any submodules."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Collection, Sequence

import torch
from torch import nn

from ..names import shortened
from .discovery import Names
from .groups import LayerGroup, as_groups, check_layer_groups


def choose_parameters(
    backbone: nn.Module,
    layer_groups: Sequence[LayerGroup],
    trainable_groups: int = 0,
    trainable: Sequence[LayerGroup | nn.Module] | None = None,
) -> set[str]:
    """Return the names of the parameters of the last layer groups, or of the given parts.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> groups = (LayerGroup("0", ("0.weight", "0.bias")), LayerGroup("1", ("1.weight", "1.bias")))
    >>> sorted(choose_parameters(backbone, groups, trainable_groups=1))
    ['1.bias', '1.weight']
    >>> sorted(choose_parameters(backbone, groups, trainable=[backbone[0]]))
    ['0.bias', '0.weight']

    Raises:
        TypeError: ``trainable_groups`` is not an integer, or ``trainable`` not a list of modules and LayerGroups.
        ValueError: both are given, the count is out of range, a part has no parameters or is not in the backbone, or
            the backbone gained or lost parameters since it was grouped.
    """
    check_layer_groups(backbone, layer_groups)
    if trainable is None:
        first = len(layer_groups) - _check_count(layer_groups, trainable_groups)
        return {name for group in layer_groups[first:] for name in group.parameter_names}
    if not isinstance(trainable, (list, tuple)):
        raise TypeError(
            f"trainable: a {type(trainable).__name__}; pass a list of submodules of the backbone or of LayerGroups, "
            "e.g. trainable=[model.backbone.layer1]."
        )
    if trainable_groups:
        raise ValueError(
            f"trainable_groups={trainable_groups!r} and trainable=[...] are both given; pass one of them. The last "
            "layer group is trainable=model.layer_groups[-1:]."
        )
    if not trainable:
        raise ValueError("trainable=[]: the list is empty; to freeze the whole backbone call freeze_backbone().")
    groups = as_groups(backbone, trainable, "trainable")
    first_name = Names(backbone).first_name
    for group in groups:
        if not group.parameter_names:
            raise ValueError(
                f"trainable: {group.name!r} has no parameters, so it cannot train; pass modules with parameters."
            )
    return {first_name[name] for group in groups for name in group.parameter_names}


def set_trainable(backbone: nn.Module, names: Collection[str], left_off: Collection[str] = ()) -> None:
    """Unfreeze the named parameters of a backbone and freeze all others.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> set_trainable(backbone, {"1.weight", "1.bias"}, left_off={"1.bias"})
    >>> [parameter.requires_grad for parameter in backbone.parameters()]
    [False, False, True, False]

    Parameters in ``left_off`` stay frozen, and so do integers and quantised weights, which cannot train. Warns about
    quantised weights among ``names``, and if all of ``names`` are in ``left_off``.
    """
    if names and all(name in left_off for name in names):
        warnings.warn(
            f"freeze_backbone: all {len(names)} parameters to unfreeze ({shortened(sorted(names))}) stay frozen, "
            "because they were frozen next to trainable ones when the model was built; to train them, call "
            "requires_grad_(True) on the network before it is wrapped.",
            stacklevel=3,
        )
    quantised: list[str] = []
    for name, parameter in backbone.named_parameters():
        # Set as an attribute: an uninitialized parameter of a lazy layer has no `requires_grad_`.
        parameter.requires_grad = name in names and name not in left_off and can_train(parameter)
        if name in names and not can_train(parameter) and type(parameter) is not nn.Parameter:
            quantised.append(name)
    if quantised:
        warnings.warn(
            f"{len(quantised)} quantised parameters ({shortened(quantised)}) get no gradient and stay frozen; train "
            "adapters (PEFT), or train the network before it is quantised.",
            stacklevel=3,
        )


def count_trainable_groups(
    backbone: nn.Module, layer_groups: Sequence[LayerGroup], left_off: Collection[str] = ()
) -> int | None:
    """Return the number of layer groups that train; None if they are not the last ones.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    >>> groups = (LayerGroup("0", ("0.weight", "0.bias")), LayerGroup("1", ("1.weight", "1.bias")))
    >>> count_trainable_groups(backbone, groups) is None
    True
    >>> count_trainable_groups(backbone.requires_grad_(False), groups)
    0
    """
    parameters = check_layer_groups(backbone, layer_groups)
    training = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if not training:
        return 0
    found = None
    expected: set[str] = set()
    for count, group in enumerate(reversed(layer_groups), start=1):
        expected |= {name for name in group.parameter_names if name not in left_off and can_train(parameters[name])}
        if training == expected:
            found = count  # a group whose parameters cannot train counts as trainable
    return found


def find_fixed(backbone: nn.Module, layer_groups: Sequence[LayerGroup]) -> frozenset[str]:
    """Return the parameters that the author of a network fixed: those frozen independently of the layer groups.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> groups = (LayerGroup("0", ("0.weight", "0.bias")), LayerGroup("1", ("1.weight", "1.bias")))
    >>> _ = backbone[0].requires_grad_(False)
    >>> sorted(find_fixed(backbone, groups))
    []
    >>> _ = backbone[1].bias.requires_grad_(False)
    >>> sorted(find_fixed(backbone, groups))
    ['0.bias', '0.weight', '1.bias']

    A fixed position table or the weights under PEFT's adapters share their group with trainable parameters. If each
    group is frozen either as a whole or not at all, the network was frozen for fine-tuning, and nothing is fixed.
    """
    parameters = dict(backbone.named_parameters())
    able = {name: parameter for name, parameter in parameters.items() if can_train(parameter)}
    states = ({able[name].requires_grad for name in group.parameter_names if name in able} for group in layer_groups)
    if all(len(of_group) <= 1 for of_group in states):
        return frozenset()
    return frozenset(name for name, parameter in able.items() if not parameter.requires_grad)


def warn_of_fixed(backbone: nn.Module, fixed: Collection[str]) -> None:
    """Warn if ``unfreeze_backbone`` leaves more than a tenth of a backbone frozen.

    >>> warn_of_fixed(nn.Linear(2, 2), [])
    """
    names = Names(backbone)
    found = [name for name in names.sizes if name in fixed]
    if names.share(found) > 0.1:  # more than a position table
        warnings.warn(
            f"unfreeze_backbone: {len(found)} parameters ({names.share(found):.1%} of the backbone) stay frozen, "
            f"because they were frozen next to trainable ones when the model was built ({shortened(found)}); "
            "to train them, call requires_grad_(True) on the network before it is wrapped.",
            stacklevel=3,
        )


def can_train(parameter: torch.Tensor) -> bool:
    """Return whether a parameter can train: integers and quantised weights get no gradient.

    >>> can_train(torch.zeros(2)), can_train(torch.zeros(2, dtype=torch.int8))
    (True, False)

    A quantised weight, such as torchao's, is a subclass with a floating-point dtype that wraps values of another dtype.
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


def _check_count(layer_groups: Sequence[LayerGroup], trainable_groups: int) -> int:
    is_whole = not isinstance(trainable_groups, bool) and hasattr(trainable_groups, "__index__")
    if not is_whole or not 0 <= operator.index(trainable_groups) <= len(layer_groups):
        names = ", ".join(group.name for group in layer_groups)
        raise (ValueError if is_whole else TypeError)(
            f"trainable_groups={trainable_groups!r}: the backbone has {len(layer_groups)} layer groups "
            f"({names or 'none, as it has no parameters'}); pass {'' if is_whole else 'an integer, '}0 to "
            f"{len(layer_groups)}."
        )
    return operator.index(trainable_groups)
