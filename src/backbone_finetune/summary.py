"""Text reports of which parameters are frozen and which train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parameter import is_lazy

from .layers.groups import LayerGroup, check_layer_groups


def describe_by_group(backbone: nn.Module, classifier: nn.Module, layer_groups: Sequence[LayerGroup]) -> str:
    """Return a table of parameters, state and mode of each layer group and of the classifier.

    >>> backbone, head = nn.Linear(2, 2).requires_grad_(False).eval(), nn.Linear(2, 3)
    >>> print(describe_by_group(backbone, head, [LayerGroup("(root)", ("weight", "bias"))]))
    group       parameters  state      mode
    (root)               6  frozen     eval
    classifier           9  trainable  train
    trainable parameters: 9 of 15 (60.00%)
    """
    modules = dict(backbone.named_modules())
    parameters = check_layer_groups(backbone, layer_groups)
    rows = [("group", "parameters", "state", "mode")]
    for group in layer_groups:
        own = [parameters[name] for name in group.parameter_names]
        owners = (modules[name.rpartition(".")[0]] for name in group.parameter_names)
        rows.append(_row(group.name, own, owners))
    rows.append(_row("classifier", list(classifier.parameters()), classifier.modules()))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{n:{widths[0]}}  {p:>{widths[1]}}  {s:{widths[2]}}  {m}".rstrip() for n, p, s, m in rows]
    every = [*parameters.values(), *classifier.parameters()]
    total = _count(every)
    trainable = _count(parameter for parameter in every if parameter.requires_grad)
    share = f" ({trainable / total:.2%})" if total else ""
    return "\n".join([*lines, f"trainable parameters: {trainable:,} of {total:,}{share}"])


def describe_by_name(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Return one line for each parameter, frozen or trainable.

    >>> print(describe_by_name(nn.Linear(2, 2).requires_grad_(False).named_parameters()))
    Frozen parameter: weight
    Frozen parameter: bias
    """
    return "\n".join(
        f"{'Trainable' if parameter.requires_grad else 'Frozen'} parameter: {name}"
        for name, parameter in named_parameters
    )


def _row(name: str, parameters: Sequence[nn.Parameter], owners: Iterable[nn.Module]) -> tuple[str, str, str, str]:
    states = {"trainable" if parameter.requires_grad else "frozen" for parameter in parameters}
    modes = {"train" if module.training else "eval" for module in owners}
    return name, f"{_count(parameters):,}", _one_of(states), _one_of(modes)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Count the values. A lazy parameter has none before its first forward."""
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def _one_of(words: set[str]) -> str:
    return words.pop() if len(words) == 1 else "mixed" if words else "-"
