"""The one home of depth: an ordered, complete partition of a backbone, coarse to freeze by, fine to decay by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from timm.models import group_parameters
from torch import nn


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
    """Partition the parameters of a backbone into layer groups, input to output.

    >>> import timm
    >>> [group.name for group in find_layer_groups(timm.create_model("resnet18", num_classes=0))]
    ['stem', 'layer1', 'layer2', 'layer3', 'layer4']

    A timm network is grouped by its own `group_matcher(coarse=True)`, one without a matcher by the stages that its
    `feature_info` names, any other network by its direct children in definition order.
    """
    aliases = _names_of_each_parameter(backbone)
    every_name = [name for names in aliases.values() for name in names]
    if hasattr(backbone, "group_matcher"):
        indices = _match(every_name, _coarse_matcher(backbone))
        first_is_stem = True
    elif stages := _feature_stages(backbone):
        indices = _index_by_stage(every_name, stages)
        first_is_stem = -1 in indices.values()
    else:
        return _group_by_child(backbone, aliases)
    members: dict[int, list[str]] = {}
    for name, names in aliases.items():
        members.setdefault(min(indices[alias] for alias in names), []).append(name)
    modules = dict(backbone.named_modules(remove_duplicate=False))
    ordered = [members[index] for index in sorted(members)]
    titles = [_recognisable_name(modules, aliases, names) for names in ordered]
    if first_is_stem:
        titles[:1] = ["stem"]
    return tuple(LayerGroup(title, tuple(names)) for title, names in zip(titles, ordered, strict=True))


def as_layer_groups(backbone: nn.Module, given: Sequence[LayerGroup | nn.Module]) -> tuple[LayerGroup, ...]:
    """Check layer groups that the user gives, as groups or as submodules of the backbone.

    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> as_layer_groups(backbone, [backbone[0], LayerGroup("top", ("2.weight", "2.bias"))])[0].name
    '0'

    Raises ValueError unless they cover each parameter of the backbone exactly once, and have different names.
    """
    aliases = _names_of_each_parameter(backbone)
    first_name = {alias: name for name, names in aliases.items() for alias in names}
    groups: list[LayerGroup] = []
    taken: dict[str, str] = {}
    for entry in given:
        group = entry if isinstance(entry, LayerGroup) else _group_of_module(backbone, entry)
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
            if first_name[alias] not in own and not any(first_name[alias] in g.parameter_names for g in groups):
                own.append(first_name[alias])
        groups.append(LayerGroup(group.name, tuple(own)))
    covered = {name for group in groups for name in group.parameter_names}
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
    ValueError: layer groups: the backbone has lost 1 parameter (0.bias) since its FineTuneModel was built; ...
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
            f"layer groups: the backbone has {' and '.join(found)} since its FineTuneModel was built; build it anew, "
            "FineTuneModel(model.backbone, model.classifier), where layer_groups=[...] says which group each is in."
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
    aliases = _names_of_each_parameter(backbone)
    if not hasattr(backbone, "group_matcher"):
        depths = {name: depth for depth, group in enumerate(layer_groups) for name in group.parameter_names}
        return depths, len(layer_groups)
    # timm numbers only the layers that it meets, so the classifier has to be among the names for it to be counted.
    classifier_names = [f"{path}.weight" for path in _classifier_paths(backbone)]
    every_name = [name for names in aliases.values() for name in names]
    indices = _match([*every_name, *classifier_names], backbone.group_matcher(coarse=False))  # type: ignore[operator]
    return {name: min(indices[alias] for alias in names) for name, names in aliases.items()}, max(indices.values())


def _names_of_each_parameter(module: nn.Module) -> dict[str, list[str]]:
    """First name -> every name, more than one where parameters are tied."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in by_identity.values()}


def _match(names: Iterable[str], matcher: Any) -> dict[str, int]:
    # timm's own reading of a matcher: it also merges (99999,) entries and puts what is unmatched last. It asks a
    # network for its names; here the names of tied parameters and of the classifier stand beside the backbone's own.
    network = SimpleNamespace(named_parameters=lambda: ((name, name) for name in names))
    return cast("dict[str, int]", group_parameters(cast(nn.Module, network), matcher, reverse=True))


def _coarse_matcher(backbone: Any) -> Any:
    try:
        return backbone.group_matcher(coarse=True)
    except AssertionError:  # rdnet states that it has no coarse grouping; its fine one is by stage
        return backbone.group_matcher(coarse=False)


def _feature_stages(backbone: nn.Module) -> list[str]:
    """Module names of the stages of a timm network, input to output; empty for any other network."""
    information = getattr(backbone, "feature_info", None) or ()
    return [stage["module"] for stage in information if isinstance(stage, dict) and "module" in stage]


def _index_by_stage(names: Sequence[str], stages: Sequence[str]) -> dict[str, int]:
    """Stem parameters -1, a stage's its position, those after the last stage one more; between two, the later one."""
    stage_of = [next((i for i, stage in enumerate(stages) if _is_within(name, stage)), None) for name in names]
    first = next((position for position, stage in enumerate(stage_of) if stage is not None), len(names))
    indices: dict[str, int] = {}
    following = len(stages)
    for position in range(len(names) - 1, -1, -1):
        stage = stage_of[position]
        following = following if stage is None else stage
        indices[names[position]] = -1 if position < first else following
    return indices


def _group_by_child(backbone: nn.Module, aliases: dict[str, list[str]]) -> tuple[LayerGroup, ...]:
    members: dict[str, list[str]] = {"": [name for name in aliases if "." not in name]}
    for name in aliases:
        if "." in name:
            members.setdefault(name.partition(".")[0], []).append(name)
    order = ["", *(name for name, _ in backbone.named_children())]
    # "(root)" cannot be the name of a child that someone reached by attribute.
    return tuple(LayerGroup(child or "(root)", tuple(members[child])) for child in order if members.get(child))


def _group_of_module(backbone: nn.Module, module: nn.Module) -> LayerGroup:
    paths = [path for path, inside in backbone.named_modules(remove_duplicate=False) if inside is module]
    if not paths:
        raise ValueError(
            f"layer_groups: {type(module).__name__} is not a submodule of the backbone ({type(backbone).__name__}); "
            "pass the very submodule objects, e.g. backbone.layer4."
        )
    path = paths[0]
    names = [name for name, _ in backbone.named_parameters(remove_duplicate=False) if _is_within(name, path)]
    return LayerGroup(path or "(root)", tuple(names))


def _recognisable_name(modules: dict[str, nn.Module], first_names: Collection[str], names: Sequence[str]) -> str:
    """The module that most of a group is: `layer4`, `blocks.11` (also where the last norm is in it), `head.norm`."""
    path = ""
    while True:
        below = Counter(name[len(path) :].partition(".")[0] for name in names if name.startswith(path))
        path += below.most_common(1)[0][0]
        if path not in modules:  # a parameter that the network's root holds
            return path
        owned = [name for name in first_names if _is_within(name, path)]
        if set(names).issuperset(owned):
            # `head` alone would read like the classifier; `head.norm` says what is left of it.
            leaf = owned[0].rpartition(".")[0]
            return leaf if all(name.rpartition(".")[0] == leaf for name in owned) else path
        path += "."


def _is_within(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _classifier_paths(backbone: nn.Module) -> tuple[str, ...]:
    configuration = getattr(backbone, "pretrained_cfg", None) or {}
    paths = configuration.get("classifier") or "classifier"
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _shortened(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
