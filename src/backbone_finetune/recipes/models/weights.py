"""A timm network by name, with the weights that were asked for; each mistake is told before any work starts."""

from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import try_to_load_from_cache  # it comes with timm
from timm.models import PretrainedCfg, load_state_dict
from torch import nn

from backbone_finetune.validation import check_architecture

from .packaged import ARCHITECTURE as PACKAGED_ARCHITECTURE
from .packaged import load_packaged_network

__all__ = ["find_cached_weights", "load_checkpoint_network", "load_network", "load_pretrained_network"]

# What timm calls a weights file on the hub, unless its registry says otherwise; it looks for the first one first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_network(
    architecture: str | None, *, pretrained: bool = False, checkpoint: Path | None = None
) -> tuple[str, str, nn.Module]:
    """Build a network with the weights asked for: returns its architecture, where the weights are from, and itself.

    Without an architecture it is EfficientNet-Lite0, and then, without another source, with the packaged weights.

    >>> load_network("test_resnet")[:2]
    ('test_resnet', 'random weights (--pretrained or --checkpoint FILE loads trained ones)')

    Raises:
        ValueError: two sources were given, or what the one in use raises.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained weights and checkpoint {checkpoint} were both asked for; choose one")
    name = architecture or PACKAGED_ARCHITECTURE
    if pretrained:
        return name, "timm's pretrained weights", load_pretrained_network(name)
    if checkpoint is not None:
        return name, f"weights from {checkpoint}", load_checkpoint_network(name, checkpoint)
    if architecture is None:
        return name, "ImageNet weights from a package", load_packaged_network()
    check_architecture(name)
    return name, "random weights (--pretrained or --checkpoint FILE loads trained ones)", timm.create_model(name)


def load_pretrained_network(architecture: str, **arguments: Any) -> nn.Module:
    """Build an architecture with timm's pretrained weights, from the hub or its cache; ``arguments`` are timm's own.

    >>> load_pretrained_network("resnet10t_with_a_typo")
    Traceback (most recent call last):
    ...
    ValueError: resnet10t_with_a_typo: timm ... has no such architecture; ...

    Raises:
        ValueError: no such architecture, or no pretrained weights for it.
        OSError: the weights can't be fetched.
    """
    check_architecture(architecture)
    if not timm.is_model_pretrained(architecture):
        raise ValueError(
            f"{architecture}: timm has no pretrained weights for it; "
            "choose another with timm.list_models(pretrained=True), or pass --checkpoint FILE"
        )
    try:
        return timm.create_model(architecture, pretrained=True, **arguments)
    except OSError as error:
        raise OSError(
            f"{architecture}: its pretrained weights could not be fetched ({error}); "
            "with a weights file on disk, pass --checkpoint FILE instead of --pretrained"
        ) from error


def find_cached_weights(architecture: str) -> Path | None:
    """Find timm's pretrained weights of an architecture where an earlier download left them; nothing is fetched.

    >>> find_cached_weights("cs3darknet_s") is None  # nobody has published any
    True
    """
    source = timm.get_pretrained_cfg(architecture)
    if source is None:
        return None
    if source.hf_hub_id:
        repository, _, revision = source.hf_hub_id.partition("@")
        for name in (source.hf_hub_filename,) if source.hf_hub_filename else HUB_FILES:
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):  # else None, or the mark of a file that the hub is known not to have
                return Path(found)
        return None
    if not source.url:
        return None
    name = Path(urlparse(source.url).path).name if isinstance(source.url, str) else source.url[1]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    return path if path.is_file() else None


def load_checkpoint_network(architecture: str, path: Path, **arguments: Any) -> nn.Module:
    """Build an architecture with the weights of a file on disk, in any format that timm reads for it.

    The file must hold this very network: its classifier may have any number of classes, or be missing from the file,
    but no other tensor may be missing, left over or of another shape.

    >>> from safetensors.torch import save_file
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "weights.safetensors")
    ...     save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    ...     load_checkpoint_network("test_resnet", path).num_classes
    7

    Raises:
        ValueError: no such architecture, or the file can't be read, or it holds another network.
        FileNotFoundError: there is no such file.
    """
    check_architecture(architecture)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file")
    try:
        tensors = load_state_dict(str(path))
    except Exception as error:  # what torch's unpickler says of a file that is no pickle can be anything
        raise ValueError(f"{path}: not a readable weights file ({shorten(str(error), 300)})") from error
    # timm loads strictly only when both sides have the same classes, so build the network with as many as the file
    # has. Without a classifier under timm's name, the file is in its authors' own format (timm translates it, and it
    # has the usual classes) or has none.
    defaults = timm.get_pretrained_cfg(architecture) or PretrainedCfg()
    names = (defaults.classifier,) if isinstance(defaults.classifier, str) else defaults.classifier or ()
    classifier = next((tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors), None)
    if classifier is not None:
        return create_filled_network(architecture, path, num_classes=len(classifier), **arguments)
    try:
        return create_filled_network(architecture, path, num_classes=defaults.num_classes, **arguments)
    except ValueError:
        return create_filled_network(architecture, path, num_classes=0, **arguments)


def create_filled_network(architecture: str, path: Path, *, num_classes: int, **arguments: Any) -> nn.Module:
    """Build an architecture with so many classes, and fill it from a file that has as many."""
    overlay = {"file": str(path), "num_classes": num_classes, "label_offset": 0}
    try:
        return timm.create_model(
            architecture, num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    except Exception as error:  # timm's translators fail in their own ways on a file that is not theirs
        raise ValueError(f"{path}: these are not the weights of {architecture} ({shorten(str(error), 300)})") from error
