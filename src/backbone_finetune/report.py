"""What a FineTuneModel reports of its frozen parts: a table, names, digests, and whether they changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.parameter import is_lazy

from . import freezing, verification
from .distributed import reshard
from .layers.groups import LayerGroup, check_layer_groups
from .splitting import Reassembly


class FrozenReport(nn.Module):
    """The methods of a FineTuneModel that show and check what is frozen.

    >>> from backbone_finetune import FineTuneModel
    >>> FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 3)).freeze_backbone().print_trainable_parameters()
    group       parameters  state      mode
    (root)               6  frozen     eval
    classifier           9  trainable  train
    trainable parameters: 9 of 15 (60.00%)
    """

    backbone: nn.Module
    classifier: nn.Module
    norm_eval: bool
    _layer_groups: tuple[LayerGroup, ...]
    _reassembly: Reassembly

    def print_trainable_parameters(self, *, by_name: bool = False) -> None:
        """Print which parameters are frozen and which train.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Linear(2, 2, False), nn.Linear(2, 3, False)).print_trainable_parameters(by_name=True)
        Trainable parameter: backbone.weight
        Trainable parameter: classifier.weight

        Args:
            by_name: list each parameter by its name in the original network. Default: a table by layer group.
        """
        if by_name:
            named = ((self._reassembly.original_name(name), parameter) for name, parameter in self.named_parameters())
            print(describe_by_name(named))
        else:
            print(describe_by_group(self.backbone, self.classifier, self._layer_groups))

    def frozen_fingerprint(self) -> dict[str, str]:
        """Return a digest of each frozen parameter and buffer, by state-dict name.

        >>> from backbone_finetune import FineTuneModel
        >>> sorted(FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone().frozen_fingerprint())
        ['backbone.bias', 'backbone.weight']

        A buffer is frozen if its module is. The digest of a DTensor is that of its local shard.
        """
        reshard(self)
        return verification.fingerprint(verification.frozen_tensors(self, self._frozen_modules()))

    def frozen_names(self) -> set[str]:
        """Return the names that ``frozen_fingerprint`` returns, without reading the tensors.

        >>> from backbone_finetune import FineTuneModel
        >>> FineTuneModel(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)).freeze_backbone().frozen_names()
        {'backbone.weight'}
        """
        return set(verification.frozen_tensors(self, self._frozen_modules()))

    def assert_frozen(self) -> AbstractContextManager[None]:
        """Return a context that raises AssertionError if a tensor that is frozen on entry has changed on exit.

        >>> from backbone_finetune import FineTuneModel
        >>> model = FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone()
        >>> with model.assert_frozen():
        ...     _ = model.backbone.bias.data.zero_()
        Traceback (most recent call last):
        AssertionError: assert_frozen: 1 of 2 frozen tensors changed...

        Digests of all bits are compared, on a CUDA device checksums. The message lists those that changed, with the
        likely cause.
        """
        return verification.assert_unchanged(self, self._frozen_modules, self._layer_groups)

    def _frozen_modules(self) -> list[nn.Module]:
        return list(freezing.frozen_modules(self, self.backbone, self._layer_groups, norm_eval=self.norm_eval))


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
    modes = {"train" if module.training else "eval" for module in owners}
    return name, f"{_count(parameters):,}", describe_state(parameters), _one_of(modes)


def describe_state(parameters: Iterable[nn.Parameter]) -> str:
    """Return whether parameters are "frozen" or "trainable"; "mixed" if there are both, and "-" without any."""
    return _one_of({"trainable" if parameter.requires_grad else "frozen" for parameter in parameters})


def _count(parameters: Iterable[nn.Parameter]) -> int:
    """Count the values. A lazy parameter has none before its first forward."""
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def _one_of(words: set[str]) -> str:
    return words.pop() if len(words) == 1 else "mixed" if words else "-"
