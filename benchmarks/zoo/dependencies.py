"""Which layer groups each operator of a forward pass depends on, watched on the meta device: no values, no cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbone_finetune import LayerGroup

_NOTHING = -1


@dataclass
class Sources:
    """What a tensor was computed from: the first and the last layer group, and whether the image is in it."""

    first_group: int = _NOTHING
    last_group: int = _NOTHING
    has_image: bool = False

    def merge(self, other: Sources) -> None:
        groups = [group for group in (self.first_group, other.first_group) if group != _NOTHING]
        self.first_group = min(groups, default=_NOTHING)
        self.last_group = max(self.last_group, other.last_group)
        self.has_image = self.has_image or other.has_image


class DependencyTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a forward pass, below autograd, where each operator shows all of the tensors that it reads and writes.

    `walked_through` holds (earlier, later): something of the earlier layer group is computed from a result of the
    later one. With the earlier one frozen and the later one training, backward still has to walk through the former.
    """

    def __init__(self, backbone: nn.Module, layer_groups: Sequence[LayerGroup], image: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        parameters = dict(backbone.named_parameters())
        self.walked_through: set[tuple[int, int]] = set()
        self.random_operators: set[str] = set()
        self._alive: list[torch.Tensor] = [image]  # so that no storage's identity is given to another
        self._sources = {_identity(image): Sources(has_image=True)}
        for position, group in enumerate(layer_groups):
            for name in group.parameter_names:
                self._sources[_identity(parameters[name])] = Sources(position, position)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_attention_without_dropout(func, args, kwargs):
            self.random_operators.add(str(func))
        read = [self._sources_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)]
        latest = max((sources.last_group for sources in read if sources.has_image), default=_NOTHING)
        for sources in read:
            if not sources.has_image and _NOTHING < sources.first_group < latest:
                self.walked_through.add((sources.first_group, latest))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._alive.append(tensor)
                written = self._sources_of(tensor)
                for sources in read:
                    written.merge(sources)
        return result

    def _sources_of(self, tensor: torch.Tensor) -> Sources:
        # By storage: a view that is written to is the tensor that it views.
        return self._sources.setdefault(_identity(tensor), Sources())


def _identity(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_attention_without_dropout(func: Any, args: Any, kwargs: Any) -> bool:
    """Fused attention is tagged as random whether its dropout is on or not."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    return "dropout_p" in names and given.get("dropout_p", 0.0) == 0.0
