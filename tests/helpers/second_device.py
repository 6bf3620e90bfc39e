"""torch's meta device as a stand-in for a GPU: what makes the host wait for the device raises.

A meta tensor has no values. Reading them (``.item()``, ``.tolist()``, ``.cpu()``, a mask as an index) raises in
torch itself,
as does an operator on tensors of two devices. `no_waits` raises for what torch allows there, and what waits on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZER = sys.modules["torch.optim.optimizer"]  # torch removes its name
META = torch.device("meta")
CREATORS = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class HostWaitError(Exception):
    """The host would wait for a CUDA device."""


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and devices == {"cpu"} and result.device == META and not kwargs.get("non_blocking"):
            raise HostWaitError(f"a blocking copy of {tuple(result.shape)} to the device")
        if name == "copy_" and devices == {"cpu", "meta"} and not kwargs.get("non_blocking"):
            raise HostWaitError(f"a blocking copy of {tuple(args[1].shape)} between devices")
        if name in {"index", "index_put_"} and devices == {"cpu", "meta"}:
            raise HostWaitError("an index on the CPU into a tensor on the device")
        return result


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in CREATORS and result.device == META:
            raise HostWaitError("a tensor of Python numbers created on the device")
        return result


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise HostWaitError in the block for what makes the host wait for the meta device."""
    with ExitStack() as entered:
        entered.enter_context(_Calls())
        entered.enter_context(_Operators())
        yield


def meta_accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """Return an accelerator on the meta device, on which fused optimizers step too."""
    monkeypatch.setattr(PartialState, "default_device", META)
    monkeypatch.setattr(PartialState, "set_device", lambda state: setattr(state, "device", META))
    monkeypatch.setattr(OPTIMIZER, "_get_fused_kernels_supported_devices", lambda: ["cpu", "cuda", "meta"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator()
