"""Layer groups: an ordered, complete partition of a backbone's parameters, and their depths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..names import shortened
from .discovery import Names, find_depths, find_groups


@dataclass(frozen=True)
class LayerGroup:
    """A named part of a backbone that is frozen and unfrozen as a whole.

    >>> LayerGroup("stem", ("conv1.weight", "bn1.weight"))
    LayerGroup(name='stem', parameter_names=('conv1.weight', 'bn1.weight'))

    Args:
        name: usually the path of a module of the backbone.
        parameter_names: names relative to the backbone.
    """

    name: str
    parameter_names: tuple[str, ...]


def find_layer_groups(backbone: nn.Module) -> tuple[LayerGroup, ...]:
    """Partition the parameters of any backbone into layer groups, its stages or blocks, from input to output.

    >>> import timm
    >>> [group.name for group in find_layer_groups(timm.create_model("resnet18", num_classes=0))]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    >>> vit = nn.Sequential(nn.Linear(4, 8), blocks, nn.LayerNorm(8))
    >>> [group.name for group in find_layer_groups(vit)]
    ['0', '1.0', '1.1', '1.2']

    The rules, in this order:

    1. A timm network is grouped by its ``group_matcher(coarse=True)``, or without one by the stages in its
       ``feature_info``. They are used only if they match the network's names. Parameters that a matcher does not match
       (a neck, a norm) go last, as in timm.
    2. Otherwise, if one child has more than 80 % of the parameters, or more than half and no sibling has the same
       structure, the rules apply to that child (the network inside an adapter or a PEFT wrapper). Siblings with the
       same structure, such as the stages of a ResNet, are not split. Parameters before that child are one group; each
       module after it is another.
    3. Without such a child, each child with parameters is a group. Parameters of the module itself join the first
       group. A child with vectors alone (a norm) joins the group before it.
    4. A last group with less than 1 % of the parameters (a norm, a position table, a transformer's pooler) joins the
       group before it, also in timm networks, so that ``trainable_groups=1`` trains a block. A layer with a matrix does
       not join if both together would have more than 80 %.
    """
    return tuple(LayerGroup(title, tuple(names)) for title, names in find_groups(backbone, Names(backbone)))


def as_layer_groups(backbone: nn.Module, given: Sequence[LayerGroup | nn.Module] | None) -> tuple[LayerGroup, ...]:
    """Check layer groups from the user, given as LayerGroups or as submodules; None finds them.

    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> as_layer_groups(backbone, [backbone[0], LayerGroup("top", ("2.weight", "2.bias"))])[0].name
    '0'

    Raises:
        TypeError: an entry is neither a module nor a LayerGroup.
        ValueError: they do not cover each parameter of the backbone exactly once, or two have the same name.
    """
    if given is None:
        return find_layer_groups(backbone)
    names = Names(backbone)
    groups: list[LayerGroup] = []
    taken: dict[str, str] = {}
    covered: set[str] = set()
    for group in as_groups(backbone, given, "layer_groups"):
        own: list[str] = []
        for alias in group.parameter_names:
            if alias in taken:
                raise ValueError(
                    f"layer_groups: {alias!r} is in both {taken[alias]!r} and {group.name!r}; "
                    "each parameter belongs to one group."
                )
            taken[alias] = group.name
            # A tied parameter has several names; it stays in the first group that names it.
            if (first := names.first_name[alias]) not in covered:
                covered.add(first)
                own.append(first)
        groups.append(LayerGroup(group.name, tuple(own)))
    if missing := [name for name in names.aliases if name not in covered]:
        raise ValueError(
            f"layer_groups: {len(missing)} parameters of the backbone are in no group ({shortened(missing, 4)}); "
            "add them to a group."
        )
    if twice := [name for name, count in Counter(group.name for group in groups).items() if count > 1]:
        raise ValueError(f"layer_groups: two groups have the name {twice[0]!r}; give each group its own name.")
    return tuple(groups)


def check_layer_groups(backbone: nn.Module, layer_groups: Sequence[LayerGroup]) -> dict[str, nn.Parameter]:
    """Return the parameters of a backbone by name; raise ValueError unless they are those of its layer groups.

    >>> backbone = nn.Sequential(nn.Linear(2, 2))
    >>> groups = find_layer_groups(backbone)
    >>> backbone[0] = nn.Linear(2, 2, bias=False)
    >>> check_layer_groups(backbone, groups)
    Traceback (most recent call last):
    ...
    ValueError: layer groups: the backbone has lost 1 parameter (0.bias) since it was grouped; call ...
    """
    parameters = dict(backbone.named_parameters())
    grouped = {name for group in layer_groups for name in group.parameter_names}
    changes = {"lost": [name for group in layer_groups for name in group.parameter_names if name not in parameters]}
    changes["gained"] = [name for name in parameters if name not in grouped]
    if found := [
        f"{verb} {len(names)} parameter{'s' * (len(names) > 1)} ({shortened(names, 4)})"
        for verb, names in changes.items()
        if names
    ]:
        raise ValueError(
            f"layer groups: the backbone has {' and '.join(found)} since it was grouped; call "
            "model.regroup() to find its layer groups again, or set them: model.regroup(layer_groups=[...])."
        )
    return parameters


def layer_depths(backbone: nn.Module, layer_groups: Sequence[LayerGroup]) -> tuple[dict[str, int], int]:
    """Return the depth of each backbone parameter and of the classifier, counted from the input.

    >>> import timm
    >>> backbone = timm.create_model("resnet18", num_classes=0)
    >>> depths, classifier_depth = layer_depths(backbone, find_layer_groups(backbone))
    >>> depths["conv1.weight"], depths["layer4.1.bn2.weight"], classifier_depth
    (0, 8, 9)

    The depths are those of ``timm.optim.param_groups_layer_decay`` for the network with its classifier, which is last.
    For a network without a ``group_matcher`` they count its layer groups.

    Raises:
        ValueError: the backbone gained or lost parameters since it was grouped.
    """
    check_layer_groups(backbone, layer_groups)
    if (found := find_depths(backbone, Names(backbone))) is not None:
        return found
    depths = {name: depth for depth, group in enumerate(layer_groups) for name in group.parameter_names}
    return depths, len(layer_groups)


def as_groups(backbone: nn.Module, given: Sequence[LayerGroup | nn.Module], argument: str) -> list[LayerGroup]:
    """Convert each entry to a LayerGroup; a submodule becomes the group of all its parameters.

    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> as_groups(backbone, [backbone[1]], "layer_groups")
    [LayerGroup(name='1', parameter_names=('1.weight', '1.bias'))]

    Raises:
        TypeError: an entry is neither a module nor a LayerGroup.
        ValueError: a module, or a name in a LayerGroup, is not in the backbone.
    """
    known = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    paths: dict[int, str] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), path)
    groups: list[LayerGroup] = []
    for entry in given:
        if isinstance(entry, LayerGroup):
            if unknown := [name for name in entry.parameter_names if name not in known]:
                raise ValueError(
                    f"{argument}: {unknown[0]!r} in group {entry.name!r} is not a parameter of the backbone; "
                    "names are relative to the backbone, as in backbone.named_parameters()."
                )
            groups.append(entry)
            continue
        if not isinstance(entry, nn.Module):
            raise TypeError(
                f"{argument}: {entry!r} is neither a module nor a LayerGroup; pass submodule objects, e.g. "
                "backbone.layer4, or LayerGroups."
            )
        if id(entry) not in paths:
            raise ValueError(
                f"{argument}: {type(entry).__name__} is not a submodule of the backbone ({type(backbone).__name__}); "
                "pass its submodule objects, e.g. backbone.layer4."
            )
        path = paths[id(entry)]
        names = [name for name, _ in entry.named_parameters(path, remove_duplicate=False)]
        groups.append(LayerGroup(path or "(root)", tuple(names)))
    return groups
