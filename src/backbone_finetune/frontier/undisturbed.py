"""Run a forward without side effects on the random state and on buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_ONE_AT_A_TIME = threading.RLock()  # all threads share the random state


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
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in network.modules()
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        with torch.random.fork_rng(sorted(devices, key=str), device_type=kind):
            try:
                yield
            finally:
                with torch.no_grad():
                    for module, name, buffer, values in buffers:
                        module._buffers[name] = buffer.copy_(values)
