"""The one home of depth: an ordered, complete partition of a backbone, coarse to freeze by, fine to decay by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .discovery import Names, find_depths, find_groups


@dataclass(frozen=True)
class LayerGroup:
    """A named part of a backbone that freezes and unfreezes as one.

    >>> LayerGroup("stem", ("conv1.weight", "bn1.weight"))
    LayerGroup(name='stem', parameter_names=('conv1.weight', 'bn1.weight'))

    `parameter_names` are relative to the backbone.
    """

    name: str
    parameter_names: tuple[str, ...]


def find_layer_groups(backbone: nn.Module) -> tuple[LayerGroup, ...]:
    """Partition the parameters of any backbone into layer groups, input to output: its stages or its blocks.

    >>> import timm
    >>> [group.name for group in find_layer_groups(timm.create_model("resnet18", num_classes=0))]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    >>> blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3)))
    >>> vit = nn.Sequential(nn.Linear(4, 8), blocks, nn.LayerNorm(8))
    >>> [group.name for group in find_layer_groups(vit)]
    ['0', '1.0', '1.1', '1.2']

    The rule, in this order:

    1. A timm network is grouped by its own ``group_matcher(coarse=True)``, one without a matcher by the stages that
       its ``feature_info`` names. Both are looked up on the network itself, and used where its names are those that
       they know; what a matcher does not name goes last, as timm has it (a neck, a norm).
    2. Any other module is taken apart: where one child holds more than 80 % of the parameters, or more than half and
       no sibling is built like it, that child is looked at in its place, for a timm network first (an adapter, a
       wrapper as PEFT's). Siblings that are built alike, as the stages of a ResNet, stay whole. What the network
       holds before that child is one group, each part after it another.
    3. Where no child is to be taken apart, each child that has parameters is a group. What the module holds itself
       goes with the first, and a norm or whatever else has vectors alone with the layer that it follows.
    4. A last group of less than 1 % (a norm, a table of positions, a transformer's pooler) joins the one before it,
       in timm's networks as well, so that ``trainable_groups=1`` trains a block. A layer with a matrix of its own does
       not join where both would hold more than 80 %.
    """
    return tuple(LayerGroup(title, tuple(names)) for title, names in find_groups(backbone, Names(backbone)))


def as_layer_groups(backbone: nn.Module, given: Sequence[LayerGroup | nn.Module] | None) -> tuple[LayerGroup, ...]:
    """Check layer groups that the user gives, as groups or as submodules of the backbone; None finds them.

    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> as_layer_groups(backbone, [backbone[0], LayerGroup("top", ("2.weight", "2.bias"))])[0].name
    '0'

    Raises ValueError unless they cover each parameter of the backbone exactly once, and have different names.
    """
    if given is None:
        return find_layer_groups(backbone)
    aliases = Names(backbone).aliases
    first_name = {alias: name for name, names in aliases.items() for alias in names}
    groups: list[LayerGroup] = []
    taken: dict[str, str] = {}
    covered: set[str] = set()
    for group in as_groups(backbone, given, "layer_groups"):
        own: list[str] = []
        for alias in group.parameter_names:
            if alias not in first_name:
                raise ValueError(
                    f"layer_groups: {alias!r} in group {group.name!r} is no parameter of the backbone; "
                    "names are relative to the backbone, as in backbone.named_parameters()."
                )
            if alias in taken:
                raise ValueError(
                    f"layer_groups: {alias!r} is in both {taken[alias]!r} and {group.name!r}; "
                    "each parameter belongs to one group."
                )
            taken[alias] = group.name
            # A tied parameter has several names; it stays in the first group that names it.
            if first_name[alias] not in covered:
                covered.add(first_name[alias])
                own.append(first_name[alias])
        groups.append(LayerGroup(group.name, tuple(own)))
    if missing := [name for name in aliases if name not in covered]:
        raise ValueError(
            f"layer_groups: {len(missing)} parameters of the backbone are in no group ({_shortened(missing)}); "
            "add them to a group, the one they run with."
        )
    if twice := [name for name, count in Counter(group.name for group in groups).items() if count > 1]:
        raise ValueError(f"layer_groups: the name {twice[0]!r} stands twice; give each group its own name.")
    return tuple(groups)


def check_layer_groups(backbone: nn.Module, layer_groups: Sequence[LayerGroup]) -> dict[str, nn.Parameter]:
    """Give the parameters of a backbone by name; raise ValueError unless they are those of its layer groups.

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
    changes["got"] = [name for name in parameters if name not in grouped]
    if found := [
        f"{verb} {len(names)} parameter{'s' * (len(names) > 1)} ({_shortened(names)})"
        for verb, names in changes.items()
        if names
    ]:
        raise ValueError(
            f"layer groups: the backbone has {' and '.join(found)} since it was grouped; call "
            "model.regroup(), which finds its layer groups anew, or takes yours: model.regroup(layer_groups=[...])."
        )
    return parameters


def layer_depths(backbone: nn.Module, layer_groups: Sequence[LayerGroup]) -> tuple[dict[str, int], int]:
    """Give the depth of each backbone parameter and of the classifier that stands on it, counted from the input.

    >>> import timm
    >>> backbone = timm.create_model("resnet18", num_classes=0)
    >>> depths, classifier_depth = layer_depths(backbone, find_layer_groups(backbone))
    >>> depths["conv1.weight"], depths["layer4.1.bn2.weight"], classifier_depth
    (0, 8, 9)

    Follows `timm.optim.param_groups_layer_decay` on the network with its classifier: timm's fine layers, the
    classifier last. A network without a `group_matcher` counts its layer groups instead. Raises ValueError where the
    backbone got or lost parameters since it was grouped.
    """
    check_layer_groups(backbone, layer_groups)
    if (found := find_depths(backbone, Names(backbone))) is not None:
        return found
    depths = {name: depth for depth, group in enumerate(layer_groups) for name in group.parameter_names}
    return depths, len(layer_groups)


def as_groups(backbone: nn.Module, given: Sequence[LayerGroup | nn.Module], argument: str) -> list[LayerGroup]:
    """Give each entry as a LayerGroup, a submodule with the names of all that is below it.

    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> as_groups(backbone, [backbone[1]], "layer_groups")
    [LayerGroup(name='1', parameter_names=('1.weight', '1.bias'))]

    Raises TypeError for what is neither, and ValueError for a module that is not in the backbone.
    """
    paths: dict[int, str] = {}
    for path, module in backbone.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), path)
    groups: list[LayerGroup] = []
    for entry in given:
        if isinstance(entry, LayerGroup):
            groups.append(entry)
            continue
        if not isinstance(entry, nn.Module):
            raise TypeError(
                f"{argument}: {entry!r} is neither a module nor a LayerGroup; pass the very submodule objects, e.g. "
                "backbone.layer4, or LayerGroups."
            )
        if id(entry) not in paths:
            raise ValueError(
                f"{argument}: {type(entry).__name__} is not a submodule of the backbone ({type(backbone).__name__}); "
                "pass the very submodule objects, e.g. backbone.layer4."
            )
        path = paths[id(entry)]
        names = [name for name, _ in entry.named_parameters(path, remove_duplicate=False)]
        groups.append(LayerGroup(path or "(root)", tuple(names)))
    return groups


def _shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
