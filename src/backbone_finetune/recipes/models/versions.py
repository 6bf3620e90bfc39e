"""The versions of the libraries that a result depends on."""

import platform
from importlib.metadata import version

import timm
import torch

from backbone_finetune import __version__

__all__ = ["installed_versions"]


def installed_versions() -> dict[str, str]:
    """The versions that a run, and the file that it writes, depend on.

    >>> sorted(installed_versions())
    ['accelerate', 'backbone-finetune', 'python', 'timm', 'torch']
    """
    return {
        "accelerate": version("accelerate"),  # asked for without the seconds that its import takes
        "backbone-finetune": __version__,
        "python": platform.python_version(),
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
