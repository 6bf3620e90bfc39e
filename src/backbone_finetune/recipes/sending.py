"""Send tensors to a device, without waiting for it where that is safe."""

import torch
from torch import Tensor


def can_queue(device: torch.device) -> bool:
    """Return whether copies to a device may be queued, with ``non_blocking``.

    The CPU could read memory before a queued copy has written it. MPS reads the memory of the source when that may
    be gone (https://github.com/pytorch/pytorch/issues/189690).

    >>> can_queue(torch.device("cuda")), can_queue(torch.device("cpu")), can_queue(torch.device("mps"))
    (True, False, False)
    """
    return device.type not in {"cpu", "mps"}


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a tensor to a device; to a CUDA device from pinned memory, so that the host does not wait for the copy.

    >>> send(torch.ones(2), torch.device("cpu"))
    tensor([1., 1.])
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=can_queue(device))
