"""An evaluation transform in two halves: bytes where the image is decoded, normalised floats on the device.

Pillow decodes and resizes, so the numbers are those of timm's own transform, to the bit. Measured on 500 x 375 JPEGs
(Pillow 13.0, torchvision 0.29, one core): its draft mode saves 6 % of the decoding and changes pixels; torchvision's
decoder saves 25 % and is deprecated; its resizing of bytes saves 75 % of Pillow's and is off by up to 2/255; Pillow's
``resize(box=...)`` of the crop alone saves 40 % and is off by 20/255 where it takes the axes in another order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import transforms as timm_transforms
from torch import Tensor
from torchvision import transforms  # it comes with timm

__all__ = ["Normalize", "split_transform"]

TO_TENSOR = {transforms.ToTensor, timm_transforms.MaybeToTensor, timm_transforms.ToTensor}


@dataclass(frozen=True)
class Normalize:
    """Normalise images of bytes, ``(..., C, H, W)``, to the bits of torchvision's ``ToTensor`` and ``Normalize``.

    >>> Normalize(mean=(0.5,), std=(0.5,))(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    tensor([[[-1.,  1.]]])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (self.mean, self.std))
        return images.float().div_(255).sub_(mean).div_(std)  # torchvision's operations, in its order


def split_transform(
    transform: Callable[[Image.Image], Tensor],
) -> tuple[Callable[[Image.Image], Tensor], Normalize | None]:
    """Take a transform apart: what gives ``(C, H, W)`` bytes, and the `Normalize` that is left for the device.

    A transform that does not end in torchvision's conversion and normalisation comes back whole, with None.

    >>> from timm.data import create_transform
    >>> to_bytes, normalize = split_transform(create_transform(8))
    >>> to_bytes(Image.new("RGB", (32, 24))).dtype, type(normalize).__name__
    (torch.uint8, 'Normalize')
    >>> split_transform(torch.rand_like)[1] is None
    True
    """
    steps: list[Any] = transform.transforms if isinstance(transform, transforms.Compose) else []
    if len(steps) < 2 or type(steps[-1]) is not transforms.Normalize or type(steps[-2]) not in TO_TENSOR:
        return transform, None
    mean, std = (tuple(torch.as_tensor(value).flatten().tolist()) for value in (steps[-1].mean, steps[-1].std))
    return transforms.Compose([*steps[:-2], transforms.PILToTensor()]), Normalize(mean, std)
