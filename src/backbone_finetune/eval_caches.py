"""Restore module modes, and clear what modules cache in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def preserve_modes(module: nn.Module) -> Iterator[None]:
    """Restore the mode of each submodule on exit, and clear caches that depend on the weights.

    >>> layer = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with preserve_modes(layer):
    ...     _ = layer.eval()
    >>> [part.training for part in layer]
    [True, False]
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        module.train(True)  # clears the attention biases that levit and similar networks cache in eval mode
        for part, training in modes:
            part.training = training


def clear_caches(module: nn.Module, *_: Any) -> None:
    """Clear what modules computed from their weights in eval mode. Modes do not change.

    >>> clear_caches(nn.Linear(2, 2))

    The further arguments are those of a hook of ``load_state_dict``.
    """
    with preserve_modes(module):
        pass


def clear_caches_on_load(module: nn.Module) -> None:
    """Clear the caches of each submodule that overrides ``train()`` when a state dict is loaded into it.

    >>> layer = nn.MultiheadAttention(2, 1)
    >>> clear_caches_on_load(layer)
    >>> clear_caches in layer._load_state_dict_post_hooks.values()
    False

    The hooks are registered on those submodules, so they run whichever module is loaded: the model, a stage of its
    backbone, a module that contains the model, or the original network that shares the submodules.
    """
    for part in module.modules():
        if type(part).train is not nn.Module.train and clear_caches not in part._load_state_dict_post_hooks.values():
            part.register_load_state_dict_post_hook(clear_caches)  # type: ignore[no-untyped-call]
