"""Where features are kept between runs, and the key under which they are used again."""

import hashlib
import json
import os
from collections.abc import Set
from dataclasses import dataclass
from importlib.metadata import version

import timm
import torch
from torch import nn

from backbone_finetune import __version__
from backbone_finetune.eval_caches import clear_caches
from backbone_finetune.verification import digest

from .front import Front

__all__ = ["FeatureCache", "backbone_fingerprint"]


@dataclass(frozen=True)
class FeatureCache:
    """Where features are kept between runs, and which images they come from.

    Args:
        folder: Holds the features of one dataset and nothing else.
        data_fingerprint: Names the images, targets and transform. ``data_fingerprint(dataset)`` computes one; a name of
            your own serves as well, as long as it changes when they do.
        memory_share: Features that take more than this share of the machine's memory stay on disk, memory-mapped.

    >>> FeatureCache("cache/train", data_fingerprint="images of 2024, 224 pixels").memory_share
    0.25
    """

    folder: str | os.PathLike[str]
    data_fingerprint: str
    memory_share: float = 0.25

    def key(self, front: Front, autocast_dtype: torch.dtype | None) -> dict[str, str]:
        """Name all that is stored is made with; it is used again where the key is equal."""
        packages = {name: version(name) for name in ("torchvision", "pillow")}
        versions = {"backbone-finetune": __version__, "torch": torch.__version__, "timm": timm.__version__, **packages}
        return {
            "backbone": f"{backbone_fingerprint(front.backbone, front.trained)} {front.description}",
            "images or transform": self.data_fingerprint,
            "precision": str(autocast_dtype),
            "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        }


def backbone_fingerprint(backbone: nn.Module, trained: Set[str] = frozenset()) -> str:
    """Digest a backbone: its parameters and buffers to the bit, and the path and class name of each module.

    >>> backbone_fingerprint(nn.ReLU()) == backbone_fingerprint(nn.ReLU()) != backbone_fingerprint(nn.GELU())
    True

    Args:
        backbone: Any module.
        trained: The names of parameters and buffers that do not count.
    """
    clear_caches(backbone)  # as levit's in eval, which are computed from the parameters
    modules = [[path, type(part).__module__, type(part).__qualname__] for path, part in backbone.named_modules()]
    named = [*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)]
    content = json.dumps([modules, [[name, digest(tensor)] for name, tensor in named if name not in trained]])
    return hashlib.sha256(content.encode()).hexdigest()
