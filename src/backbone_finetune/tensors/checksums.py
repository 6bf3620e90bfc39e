"""Checksums of tensors on their device: all bits are read, and only two numbers per tensor are sent to the host."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.parameter import is_lazy

from .parts import plain_parts

_CHUNK = 2**22  # elements, so that temporary tensors take some 100 MB
# Those of SplitMix64 (Steele et al. 2014) and MurmurHash3, as signed numbers; integers of 64 bits wrap around.
_SALTS = (-0x61C8864680B583EB, -0x3B314601E57A13AD)
_FACTOR = -0x40A7B892E31B1A47


def has_checksum(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is on a CUDA device, where a checksum is faster than sending the tensor to the host.

    >>> has_checksum(torch.zeros(2))
    False
    """
    return tensor.device.type == "cuda" and not is_lazy(tensor)


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the checksum of each tensor by name, the same on all devices; see ``checksum``.

    >>> found = checksums({"zero": torch.zeros(2), "minus zero": -torch.zeros(2)})
    >>> found["zero"] == found["minus zero"]
    False
    """
    parts = {name: list(plain_parts(tensor)) for name, tensor in tensors.items()}
    sums = {name: [checksum(part) for part in each] for name, each in parts.items()}
    # One transfer for each device.
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for own in sums.values():
        for each in own:
            by_device.setdefault(each.device, []).append(each)
    values = {device: iter(torch.stack(each).tolist()) for device, each in by_device.items()}
    return {
        name: "; ".join(
            f"{part.dtype} {tuple(part.shape)} {next(values[own.device])}"
            for part, own in zip(parts[name], sums[name], strict=True)
        )
        for name in tensors
    }


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return two integers of the bits of a strided tensor, on its device: ``(2,)``, int64.

    Each is the sum, modulo 2**64, of the tensor's words times odd numbers that are mixed from their positions. The
    order of summation has no effect. A change of one word always changes it; a change of several is missed with a
    probability of about 2**-60.

    >>> checksum(torch.tensor([1.0, 2.0])).tolist() == checksum(torch.tensor([2.0, 1.0])).tolist()
    False
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    words = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    total = torch.zeros(2, dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK].long()
        position = torch.arange(start + 1, start + 1 + len(part), device=words.device)
        for index, salt in enumerate(_SALTS):
            mixed = position * salt
            mixed = (mixed ^ (mixed >> 30)) * _FACTOR
            mixed = (mixed ^ (mixed >> 27)) | 1
            total[index] += (part * mixed).sum()
    return total
