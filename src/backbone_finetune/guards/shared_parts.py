"""Find memory and modules that a frozen and a trainable part of a model share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterable, Iterator

from torch import nn

from ..tensors.parts import shared_memory


def check_shares_no_memory(model: nn.Module) -> None:
    """Raise ValueError if a frozen parameter shares its memory with a trainable one, and would change with it.

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
            "parameter (b.weight = a.weight), or copy one (b.weight.data = a.weight.data.clone())."
        )


def warn_of_shared_modes(model: nn.Module, frozen: Iterable[nn.Module]) -> None:
    """Warn about a module without parameters that depends on its mode and is in a frozen and a trainable part.

    >>> dropout = nn.Dropout()
    >>> model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), dropout), nn.Sequential(nn.Linear(2, 2), dropout))
    >>> warn_of_shared_modes(model, [])

    One object has one mode, which is then eval: dropout is off in the trainable part too.
    """
    places: dict[int, tuple[nn.Module, list[str], list[str]]] = {}
    for path, module, is_frozen in _places(model, "", {id(module) for module in frozen}, is_frozen=False):
        if next(module.parameters(), None) is None and _depends_on_mode(module):
            _, in_frozen, in_trainable = places.setdefault(id(module), (module, [], []))
            (in_frozen if is_frozen else in_trainable).append(path)
    for module, in_frozen, in_trainable in places.values():
        if in_frozen and in_trainable:
            warnings.warn(
                f"{in_frozen[0]}, which is frozen, and {in_trainable[0]}, which trains, are the same "
                f"{type(module).__name__} object; it is in eval mode, so it is off in the trainable part too. Use a "
                "separate object in each place.",
                stacklevel=5,
            )


def _places(
    module: nn.Module, path: str, frozen: Collection[int], *, is_frozen: bool
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield each path of each module, and whether it or a module above it is frozen. A shared module has several."""
    is_frozen = is_frozen or id(module) in frozen
    yield path, module, is_frozen
    for name, child in module._modules.items():
        if child is not None:
            yield from _places(child, f"{path}.{name}" if path else name, frozen, is_frozen=is_frozen)


def _depends_on_mode(module: nn.Module) -> bool:
    """Return whether a module's forward reads its mode and, for a dropout, its rate is not 0."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    rate = getattr(module, "p", getattr(module, "drop_prob", None))
    return code is not None and "training" in code.co_names and rate != 0
