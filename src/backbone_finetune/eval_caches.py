"""Modes given back as they were, and what modules cached in eval forgotten on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def preserve_modes(module: nn.Module) -> Iterator[None]:
    """Change modes inside: at the end each submodule has its own again, and its caches are forgotten.

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
        module.train(True)  # attention biases that levit and its like cached in eval are forgotten when they hear this
        for part, training in modes:
            part.training = training


def clear_caches(module: nn.Module, *_: Any) -> None:
    """Forget what modules computed from their weights in eval, and leave modes as they are.

    >>> clear_caches(nn.Linear(2, 2))

    It takes a second argument so that it can be a hook of `load_state_dict`.
    """
    with preserve_modes(module):
        pass


def clear_caches_on_load(module: nn.Module) -> None:
    """Let each part that does something of its own in `train()` forget caches when a state dict is loaded into it.

    >>> layer = nn.MultiheadAttention(2, 1)
    >>> clear_caches_on_load(layer)
    >>> clear_caches in layer._load_state_dict_post_hooks.values()
    False

    The hook stands on those parts themselves, so it holds whichever module the load begins at: the model, a stage of
    its backbone, a module that the model is in, or the plain network that shares the parts.
    """
    for part in module.modules():
        if type(part).train is not nn.Module.train and clear_caches not in part._load_state_dict_post_hooks.values():
            part.register_load_state_dict_post_hook(clear_caches)  # type: ignore[no-untyped-call]
