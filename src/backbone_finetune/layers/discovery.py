"""Find the layer groups of any network: by timm's group matcher, by timm's stages, or by structure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from inspect import getattr_static
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from timm.models import group_parameters
from torch import nn
from torch.nn.parameter import is_lazy

# A last group with a smaller share of the parameters is not a block, but a norm, a position table, or the pooler of a
# transformer (d x d parameters, while each of 12 blocks has 12 d x d).
SMALLEST_LAST_SHARE = 0.01
# A part with a larger share is split if possible. resnet18's last stage has 75 %.
LARGEST_SHARE = 0.8


class Part(NamedTuple):
    """A module inside a backbone; the names of its parameters begin with ``prefix``."""

    prefix: str
    module: nn.Module


class Structure(NamedTuple):
    """The body of a backbone, and the names of the parameters before and after it."""

    before: list[str]
    body: Part
    after: list[list[str]]


class Names:
    """The names and sizes of the parameters of a backbone. Tied parameters count once, by their first name.

    >>> names = Names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, bias=False)))
    >>> names.sizes, names.below[""], names.below["0."]
    ({'0.weight': 4, '0.bias': 2, '1.weight': 6}, 12, 6)

    ``below`` is the number of values below each prefix, and ``counts`` the number of parameters.
    ``aliases`` has all names of a parameter by its first one, and ``first_name`` the first one by any.
    """

    def __init__(self, backbone: nn.Module) -> None:
        by_identity: dict[int, list[str]] = {}
        self.sizes: dict[str, int] = {}
        self.are_vectors: dict[str, bool] = {}
        for name, parameter in backbone.named_parameters(remove_duplicate=False):
            aliases = by_identity.setdefault(id(parameter), [])
            aliases.append(name)
            if len(aliases) == 1:
                self.sizes[name] = 0 if is_lazy(parameter) else parameter.numel()
                self.are_vectors[name] = not is_lazy(parameter) and parameter.ndim <= 1
        self.aliases = {names[0]: names for names in by_identity.values()}
        self.first_name = {alias: first for first, names in self.aliases.items() for alias in names}
        self.below: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        for name, size in self.sizes.items():
            for prefix in _prefixes(name):
                self.below[prefix] += size
                self.counts[prefix] += 1

    def share(self, names: Iterable[str]) -> float:
        """Return the share of these parameters in the backbone's values, 0 to 1."""
        return sum(self.sizes[name] for name in names) / max(self.below[""], 1)


def find_structure(backbone: nn.Module, names: Names) -> Structure:
    """Find the body of a backbone: the timm network inside it, or the module whose children are its blocks.

    >>> layers = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))
    >>> backbone = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layers), nn.LayerNorm(4))
    >>> find_structure(backbone, Names(backbone)).body.prefix
    '1.0.'

    Descends into a child that has more than ``LARGEST_SHARE`` of all parameters, or more than half if no sibling has
    the same structure. The stages of a ResNet have the same structure.
    """
    before: list[str] = []
    after: list[list[str]] = []
    body = Part("", backbone)
    while not is_timm_network(body.module):
        own, children = _split_by_child(body, names)
        position = _dominant(children, names)
        if position is None:
            break
        before += own
        before += [name for child in children[:position] for name in child.names]
        after[:0] = [child.names for child in children[position + 1 :]]
        body = children[position].part
    return Structure(before, body, after)


def find_groups(backbone: nn.Module, names: Names) -> list[tuple[str, list[str]]]:
    """Return the name and the parameter names of each layer group; for the rule see ``groups.find_layer_groups``."""
    before, body, after = find_structure(backbone, names)
    first_is_stem = False
    if is_timm_network(body.module):
        groups, first_is_stem = _groups_of_timm(body, names)
    else:
        own, children = _split_by_child(body, names)
        groups = [child.names for child in children]
        groups = [own + groups[0], *groups[1:]] if groups else [own]
    groups = [group for group in (before, *groups, *after) if group]
    if not groups:
        return []
    if body.prefix or not is_timm_network(body.module):
        groups = _join_vectors(groups, names)
    while len(groups) > 1 and _is_no_block(groups, names):
        groups[-2:] = [groups[-2] + groups[-1]]
    paths = {path for path, _ in backbone.named_modules(remove_duplicate=False)}
    of_timm = is_timm_network(body.module)
    titles = [_recognisable_name(paths, names, group, of_timm=of_timm) for group in groups]
    if first_is_stem:
        stem = 1 if before and len(groups) > 1 and groups[0] == before else 0
        titles[stem] = f"{body.prefix}stem"
    return list(zip(titles, groups, strict=True))


def find_depths(backbone: nn.Module, names: Names) -> tuple[dict[str, int], int] | None:
    """Return timm's fine depth of each parameter and of the classifier; None without a timm group matcher."""
    before, body, after = find_structure(backbone, names)
    if not _has_matcher(body.module):
        return None
    inside = _inside(body, names)
    # timm numbers only the layers among the given names, so the classifier must be one of them to be counted.
    classifier_names = [f"{path}.weight" for path in _classifier_paths(body.module)]
    matcher = cast(Any, body.module).group_matcher(coarse=False)
    indices = match([*(alias for aliases in inside.values() for alias in aliases), *classifier_names], matcher)
    first = 1 if before else 0
    depths = dict.fromkeys(before, 0)
    for name, aliases in inside.items():
        depths[body.prefix + name] = first + min(indices[alias] for alias in aliases)
    last = first + max(indices.values())
    for group in after:
        depths |= dict.fromkeys(group, last)
        last += 1
    return depths, last


def find_timm_network(backbone: nn.Module) -> Part:
    """Return the timm network that a backbone is or contains, else the backbone itself.

    >>> import timm
    >>> find_timm_network(nn.Sequential(timm.create_model("test_resnet"), nn.Flatten())).prefix
    '0.'
    """
    body = find_structure(backbone, Names(backbone)).body
    return body if is_timm_network(body.module) else Part("", backbone)


def is_timm_network(module: nn.Module) -> bool:
    """Return whether a module itself defines its layers, by timm's ``group_matcher`` or its ``feature_info``.

    >>> import timm
    >>> is_timm_network(timm.create_model("test_resnet")), is_timm_network(nn.Linear(2, 2))
    (True, False)

    The lookup does not use ``__getattr__``, which a wrapper such as PEFT's forwards to the network inside it.
    """
    return _has_matcher(module) or bool(_feature_stages(module))


def match(names: Iterable[str], matcher: Any) -> dict[str, int]:
    """Number names by timm's ``group_parameters``, which also merges (99999,) entries and puts unmatched names last."""
    # timm reads the names from a network; this one adds those of tied parameters and of the classifier.
    network = SimpleNamespace(named_parameters=lambda: ((name, name) for name in names))
    return cast("dict[str, int]", group_parameters(cast(nn.Module, network), matcher, reverse=True))


class _Child(NamedTuple):
    part: Part
    names: list[str]


def _split_by_child(body: Part, names: Names) -> tuple[list[str], list[_Child]]:
    """Return a module's own parameters, and its children that have parameters, in definition order."""
    own: list[str] = []
    by_child: dict[str, list[str]] = {}
    for name in _inside(body, names):
        child, dot, _ = name.partition(".")
        by_child.setdefault(child, []).append(body.prefix + name) if dot else own.append(body.prefix + name)
    children = [
        _Child(Part(f"{body.prefix}{child}.", module), by_child[child])
        for child, module in body.module.named_children()
        if child in by_child
    ]
    return own, children


def _inside(body: Part, names: Names) -> dict[str, list[str]]:
    """Map the first name of each parameter of this part to all its names there, both without the prefix."""
    size = len(body.prefix)
    return {
        first[size:]: [alias[size:] for alias in aliases if alias.startswith(body.prefix)]
        for first, aliases in names.aliases.items()
        if first.startswith(body.prefix)
    }


def _dominant(children: Sequence[_Child], names: Names) -> int | None:
    """Return the position of the child to descend into, if there is one."""
    for position, child in enumerate(children):
        share = names.share(child.names)
        if share <= 0.5 or not _kinds_of_layers(child.part.module):
            continue
        siblings = [other.part.module for other in children if other is not child]
        if share > LARGEST_SHARE or not any(_is_built_like(child.part.module, sibling) for sibling in siblings):
            return position
    return None


def _is_built_like(module: nn.Module, sibling: nn.Module) -> bool:
    return type(module) is type(sibling) and not _kinds_of_layers(module).isdisjoint(_kinds_of_layers(sibling))


def _kinds_of_layers(module: nn.Module) -> set[type[nn.Module]]:
    return {type(child) for child in module.children() if next(child.parameters(), None) is not None}


def _join_vectors(groups: Sequence[list[str]], names: Names) -> list[list[str]]:
    """Join groups of vectors alone (a norm, a bias) with the group before them, or after them if they come first."""
    joined: list[list[str]] = []
    leading: list[str] = []
    for group in groups:
        if not all(names.are_vectors[name] for name in group):
            joined.append(leading + group)
            leading = []
        elif joined:
            joined[-1] = joined[-1] + group
        else:
            leading += group
    return joined or [leading]


def _is_no_block(groups: Sequence[list[str]], names: Names) -> bool:
    last, both = names.share(groups[-1]), names.share(groups[-2] + groups[-1])
    return last < SMALLEST_LAST_SHARE and (both <= LARGEST_SHARE or all(names.are_vectors[n] for n in groups[-1]))


def _has_matcher(module: nn.Module) -> bool:
    """Return whether the module itself has a matcher that matches its parameter names."""
    if getattr_static(module, "group_matcher", None) is None:
        return False
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return len(set(match(names, _coarse_matcher(module)).values())) > 1


def _groups_of_timm(body: Part, names: Names) -> tuple[list[list[str]], bool]:
    """Return the groups of a timm network, from input to output, and whether the first is what timm calls the stem."""
    inside = _inside(body, names)
    every_name = [alias for aliases in inside.values() for alias in aliases]
    if _has_matcher(body.module):
        indices = match(every_name, _coarse_matcher(body.module))
        first_is_stem = True
    else:
        indices = _index_by_stage(every_name, _feature_stages(body.module))
        first_is_stem = -1 in indices.values()
    members: dict[int, list[str]] = {}
    for name, aliases in inside.items():
        members.setdefault(min(indices[alias] for alias in aliases), []).append(body.prefix + name)
    return [members[index] for index in sorted(members)], first_is_stem


def _coarse_matcher(network: Any) -> Any:
    try:
        return network.group_matcher(coarse=True)
    except AssertionError:  # rdnet has no coarse grouping; its fine grouping is by stage
        return network.group_matcher(coarse=False)


def _feature_stages(module: nn.Module) -> list[str]:
    """Return the names of a timm network's stages, from input to output; empty if it has no such modules."""
    information = getattr_static(module, "feature_info", None)
    if not isinstance(information, (list, tuple)):
        return []
    stages = [stage["module"] for stage in information if isinstance(stage, Mapping) and "module" in stage]
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    return stages if paths.issuperset(stages) else []


def _index_by_stage(names: Sequence[str], stages: Sequence[str]) -> dict[str, int]:
    """Number parameters by stage: the stem is -1, between two stages the later counts, after the last one more."""
    stage_of = [next((i for i, stage in enumerate(stages) if name.startswith((f"{stage}.",))), None) for name in names]
    first = next((position for position, stage in enumerate(stage_of) if stage is not None), len(names))
    indices: dict[str, int] = {}
    following = len(stages)
    for position in range(len(names) - 1, -1, -1):
        stage = stage_of[position]
        following = following if stage is None else stage
        indices[names[position]] = -1 if position < first else following
    return indices


def _classifier_paths(network: nn.Module) -> tuple[str, ...]:
    configuration = getattr(network, "pretrained_cfg", None) or {}
    paths = configuration.get("classifier") or "classifier"
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _recognisable_name(paths: set[str], names: Names, group: Sequence[str], *, of_timm: bool) -> str:
    """Return the module that contains most of a group: ``layer4``, ``blocks.11`` (also with the last norm in it)."""
    below: dict[str, list[str]] = {}
    for name in group:
        for prefix in _prefixes(name):
            below.setdefault(prefix, []).append(name)
    prefix = ""
    while True:
        steps: Counter[str] = Counter()
        for name in below[prefix]:
            # By size the stem is `conv1`, not `bn1`; timm's groups are named by the number of parameters.
            steps[name[len(prefix) :].partition(".")[0]] += 1 if of_timm else names.sizes[name]
        ranked = sorted(steps, key=lambda step: (prefix + step not in paths, -steps[step]))
        path = prefix + ranked[0]
        if path not in paths:  # a parameter of the network's root
            # "(root)" is not a valid attribute name, so no child is called that.
            return "(root)" if len(steps) == len(names.sizes) else path
        prefix = f"{path}."
        if len(below[prefix]) == names.counts[prefix]:
            leaf = below[prefix][0].rpartition(".")[0]
            # `head` alone would suggest the classifier, which timm removed; `head.norm` is what is left of it.
            return leaf if of_timm and all(name.rpartition(".")[0] == leaf for name in below[prefix]) else path


def _prefixes(name: str) -> list[str]:
    """Return the prefix of each module that contains a parameter, from the root inwards."""
    steps = name.split(".")
    return ["".join(f"{step}." for step in steps[:depth]) for depth in range(len(steps))]
