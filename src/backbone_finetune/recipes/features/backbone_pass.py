"""One pass of a frozen backbone over a loader's batches, as its device likes it best."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from backbone_finetune.eval_caches import preserve_modes

__all__ = ["autocast_dtype", "backbone_batches", "in_eval", "trains"]


def trains(module: nn.Module) -> bool:
    """Say whether any parameter of a module trains.

    >>> trains(nn.Linear(2, 2)), trains(nn.Linear(2, 2).requires_grad_(False)), trains(nn.Flatten())
    (True, False, False)
    """
    return any(parameter.requires_grad for parameter in module.parameters())


def autocast_dtype(backbone: nn.Module, device: torch.device) -> torch.dtype | None:
    """Choose bf16 where a float32 backbone gains from it on a device, else None.

    >>> autocast_dtype(nn.Linear(2, 2).half(), torch.device("cpu")) is None
    True

    A CPU without bf16 instructions emulates them: EfficientNet-Lite0 took 20 times as long on one of AMD's.
    """
    if any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in backbone.parameters()):
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None
    return None


@contextmanager
def in_eval(module: nn.Module) -> Iterator[None]:
    """Hold a module in eval, and give each of its submodules its own mode back."""
    with preserve_modes(module):
        module.eval()
        yield


def backbone_batches(
    backbone: nn.Module, loader: DataLoader[Any], device: torch.device, narrow: torch.dtype | None, title: str | None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield ``(*features, targets)`` of each batch, on the CPU."""
    # Channels-last inputs are enough: convolutions follow their input, so the weights stay as they are. A batch of
    # EfficientNet-Lite0 took .73 of the time on a CPU, with the weights converted as well .70.
    convolves = device.type in {"cpu", "cuda"} and any(isinstance(module, nn.Conv2d) for module in backbone.modules())
    for batch in tqdm(loader, desc=title, unit="batch", disable=title is None):
        inputs, targets = as_pair(batch)
        inputs = inputs.to(device)
        if convolves and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        # Not inference_mode: its tensors, and what modules cache in it, could take no part in autograd afterwards.
        with torch.no_grad(), torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            outputs = backbone(inputs)
        slots = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        for slot in slots:
            if not isinstance(slot, Tensor) or slot.ndim == 0 or len(slot) != len(targets):
                raise ValueError(
                    f"the backbone gave {describe(slot)} for {len(targets)} images; it must give a tensor or a tuple "
                    "of tensors, each with one entry per image"
                )
        widened = (slot.float() if narrow is not None and slot.dtype == narrow else slot for slot in slots)
        yield (*(slot.cpu() for slot in widened), targets.cpu())


def as_pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Check that a loader's batch is ``(inputs, targets)``.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise ValueError(f"the loader gave {describe(batch)}; it must give (inputs, targets), two tensors")
    inputs, targets = batch
    return inputs, targets


def describe(value: object) -> str:
    """Name what came in a few words.

    >>> describe(torch.zeros(2, 3)), describe([1, 2, 3])
    ('a tensor of shape (2, 3)', 'a list of 3')
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}{f' of {len(value)}' if isinstance(value, tuple | list | dict) else ''}"
