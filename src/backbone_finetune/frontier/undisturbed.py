"""Run a forward without side effects on the random state and on buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

_ONE_AT_A_TIME = threading.RLock()  # all threads share the random state

Buffers = dict[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]]  # each buffer, and a copy of its values


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Restore the random state, and the buffers of modules in train mode, on exit.

    >>> layer = nn.BatchNorm1d(2)
    >>> with undisturbed(layer):
    ...     _ = layer(torch.randn(8, 2))
    >>> layer.running_mean.tolist(), layer.num_batches_tracked.item()
    ([0.0, 0.0], 0)
    """
    with _ONE_AT_A_TIME:
        devices = {p.device for p in network.parameters() if p.device.type not in ("cpu", "meta")}
        kind = next((device.type for device in devices), "cuda")
        saved = save_buffers(module for module in network.modules() if module.training)
        with torch.random.fork_rng(sorted(devices, key=str), device_type=kind):
            try:
                yield
            finally:
                restore_buffers(saved)


def save_buffers(modules: Iterable[nn.Module]) -> Buffers:
    """Return the buffers of modules, not of their submodules, with copies of their values.

    >>> norm = nn.BatchNorm1d(2)
    >>> saved = save_buffers([norm])
    >>> _ = norm(torch.randn(8, 2))
    >>> restore_buffers(saved)
    >>> norm.num_batches_tracked.item()
    0
    """
    return {
        (module, name): (buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    }


def restore_buffers(saved: Mapping[tuple[nn.Module, str], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Restore buffers and their values; see ``save_buffers``."""
    with torch.no_grad():
        for (module, name), (buffer, values) in saved.items():
            module._buffers[name] = buffer.copy_(values)
