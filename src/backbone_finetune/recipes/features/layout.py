"""The memory format of images: channels_last is faster for convolutions; some networks take contiguous images alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from backbone_finetune.eval_caches import preserve_modes

from ..rng import preserve_rng_state

T = TypeVar("T")


@dataclass
class Layout:
    """Whether a network is known to take contiguous images alone."""

    contiguous: bool = False


def in_fast_layout(
    layout: Layout, function: Callable[[Sequence[Tensor]], T], inputs: Sequence[Tensor], module: nn.Module
) -> T:
    """Call a function of a module's inputs with images in channels_last, or contiguous if that fails.

    A network that reshapes with ``view`` fails. That is kept in ``layout``, and later calls are contiguous.

    >>> layout, network = Layout(), nn.Conv2d(3, 2, 1)
    >>> images = [torch.ones(2, 3, 4, 4)]
    >>> in_fast_layout(layout, lambda inputs: network(*inputs).view(2, -1).shape, images, network), layout.contiguous
    (torch.Size([2, 32]), True)
    """
    faster = inputs if layout.contiguous else to_channels_last(inputs, module)
    try:
        return function(faster)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or all(map(torch.Tensor.is_contiguous, faster)):
            raise
        result = function(inputs)
    layout.contiguous = True
    return result


def find_layout(module: nn.Module, inputs: Sequence[Tensor]) -> Layout:
    """Find out on two images whether a module takes channels_last; it runs in eval mode, and does not change.

    >>> find_layout(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), [torch.ones(2, 3, 4, 4)])
    Layout(contiguous=False)
    """
    layout = Layout()
    with preserve_rng_state(), preserve_modes(module), torch.no_grad():
        module.eval()
        in_fast_layout(layout, lambda images: module(*images), [each[:2] for each in inputs], module)
    return layout


def to_channels_last(inputs: Sequence[Tensor], module: nn.Module) -> list[Tensor]:
    """Convert images ``(B, C, H, W)`` to channels_last if a module has convolutions, which follow their input."""
    # The weights are not converted: a batch of EfficientNet-Lite0 took .73 of the time, with converted weights .70.
    if not all(each.device.type in {"cpu", "cuda"} for each in inputs):
        return list(inputs)
    if not any(isinstance(part, nn.Conv2d) for part in module.modules()):
        return list(inputs)
    return [each.contiguous(memory_format=torch.channels_last) if each.ndim == 4 else each for each in inputs]
