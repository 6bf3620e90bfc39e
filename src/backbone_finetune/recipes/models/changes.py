"""What a network was before it was trained: where its weights came from, and how to know them again."""

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import distinct_tensors
from backbone_finetune.verification import digest

from .metadata import ModelDescription, checked
from .packaged import ARCHITECTURE as PACKAGED_ARCHITECTURE
from .packaged import load_packaged_network
from .weights import find_cached_weights, load_checkpoint_network

__all__ = ["BaseSource", "BaseWeights", "base_source", "describe_base", "digest_tensors", "find_base", "remember_base"]


class BaseSource(enum.Enum):
    """Where base weights can be found again: in the package, in the cache of timm's hub, or in a file of the user's.

    >>> BaseSource("package")
    <BaseSource.PACKAGE: 'package'>
    """

    PACKAGE = "package"
    HUB = "hub"
    FILE = "file"


@dataclass(frozen=True)
class BaseWeights:
    """Where the weights of a backbone came from, for the machine and in words, and a digest of each of its tensors.

    >>> BaseWeights(BaseSource.FILE, "weights from resnet18.pth", {}).source.value
    'file'
    """

    source: BaseSource
    words: str
    digests: Mapping[str, str]


def base_source(architecture: str | None, *, pretrained: bool, checkpoint: Path | None) -> BaseSource:
    """Say where `load_network` takes weights from, by its own arguments.

    >>> base_source(None, pretrained=False, checkpoint=None), base_source("resnet18", pretrained=True, checkpoint=None)
    (<BaseSource.PACKAGE: 'package'>, <BaseSource.HUB: 'hub'>)

    Raises:
        ValueError: from nowhere: random weights are no base that anyone could build again.
    """
    if pretrained:
        return BaseSource.HUB
    if checkpoint is not None:
        return BaseSource.FILE
    if architecture is None:
        return BaseSource.PACKAGE
    raise ValueError(
        f"{architecture} starts from random weights, which nobody could build again below what was trained; "
        "choose --pretrained or --checkpoint FILE, or leave out --trainable-only"
    )


def remember_base(model: FineTuneModel, source: BaseSource, words: str) -> BaseWeights:
    """Digest a backbone before its training, so that `save_trained_changes` knows afterwards what changed.

    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> base = remember_base(model, BaseSource.FILE, "weights from resnet.pth")
    >>> len(base.digests) == len(model.backbone.state_dict())
    True
    """
    return BaseWeights(source, words, digest_tensors(backbone_tensors(model)))


def backbone_tensors(model: FineTuneModel) -> dict[str, Tensor]:
    """Give what a file holds of a model's backbone, by the model's own names.

    >>> list(backbone_tensors(FineTuneModel(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))))
    ['backbone.weight']
    """
    return {name: tensor for name, tensor in distinct_tensors(model).items() if name.startswith("backbone.")}


def digest_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest the bits, dtype and shape of each tensor.

    >>> import torch
    >>> len(digest_tensors({"weight": torch.zeros(2)})["weight"])
    64
    """
    return {name: digest(tensor) for name, tensor in tensors.items()}


def fingerprint(digests: Mapping[str, str]) -> str:
    """Digest digests by name: one line that stands for a whole backbone, or for the rest of it that did not change.

    >>> fingerprint({"a": "1", "b": "2"}) == fingerprint({"b": "2", "a": "1"})
    True
    """
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def describe_base(base: BaseWeights, kept: Mapping[str, str]) -> dict[str, str]:
    """Say, for the metadata of a file, which base it needs: ``kept`` are the digests of what training left as it was.

    >>> sorted(describe_base(BaseWeights(BaseSource.HUB, "timm's pretrained weights", {}), {}))
    ['fingerprint', 'source', 'words']
    """
    return {"source": base.source.value, "words": base.words, "fingerprint": fingerprint(kept)}


def find_base(
    description: ModelDescription, about: Mapping[str, Any], missing: Mapping[str, Tensor], path: Path | None
) -> dict[str, Tensor]:
    """Find the base weights that a file of changes leaves out, and see that they are the very ones: tensors by name.

    ``about`` is what `describe_base` said, ``missing`` what is left out, on the meta device. The weights come from the
    file at ``path`` where one is given, else from the package, or from where timm's hub has left them on this machine;
    nothing is downloaded.

    >>> about = describe_base(BaseWeights(BaseSource.FILE, "weights from tom.pth", {}), {})
    >>> find_base(ModelDescription("test_resnet", ("cat", "dog"), {}), about, {}, None)
    Traceback (most recent call last):
    ...
    ValueError: it holds only what training changed, on top of test_resnet with weights from tom.pth; give that ...

    Raises:
        ValueError: they are others or not on this machine, or nobody gave the file that it takes, or that is not one of
            this architecture.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: the package is not installed.
    """
    for name in ("source", "words", "fingerprint"):
        checked(about.get(name), lambda value: isinstance(value, str), f"base, {name}", "text")
    sources = [source.value for source in BaseSource]
    source = BaseSource(checked(about["source"], lambda value: value in sources, "base, source", ", ".join(sources)))
    wanted = f"{description.architecture} with {about['words'][:200]}"
    model = FineTuneModel.from_timm(
        load_base_network(description, source, wanted, missing, path), num_classes=len(description.class_names)
    )
    tensors = backbone_tensors(model)
    rest = {name: tensors[name] for name in missing if name in tensors}
    found = fingerprint(digest_tensors(rest))
    if found != about["fingerprint"]:
        raise ValueError(
            f"it was trained on top of {wanted} (fingerprint {about['fingerprint'][:12]}), and "
            f"{path or 'what is found there now'} is another base ({found[:12]}); "
            "give the weights file that it was trained on (--base FILE; base=Path(...) in Python)"
        )
    return rest


def load_base_network(
    description: ModelDescription, source: BaseSource, wanted: str, missing: Mapping[str, Tensor], path: Path | None
) -> nn.Module:
    """Load the network that a base is made of; raises as `find_base` does."""
    # The dropout before the classifier is no part of the backbone.
    arguments = {name: value for name, value in description.arguments.items() if name != "drop_rate"}
    if path is None and source is BaseSource.HUB:
        # The file says whose weights to take, and it may be a stranger's: what it says starts no download.
        path = find_cached_weights(description.architecture)
        if path is None:
            raise ValueError(
                f"it holds only what training changed, on top of {wanted}, which are not in the cache of timm's hub on "
                "this machine, and a model file starts no download; fetch them with "
                f"timm.create_model({description.architecture!r}, pretrained=True) in Python, or give their weights "
                "file (--base FILE; base=Path(...) in Python)"
            )
    if path is not None:
        refuse_too_small(path, wanted, missing)
        return load_checkpoint_network(description.architecture, path, **arguments)
    if source is BaseSource.PACKAGE and description.architecture == PACKAGED_ARCHITECTURE:
        return load_packaged_network(**arguments)
    # A path that a file names is not opened: who wrote it may not choose what is read here.
    raise ValueError(
        f"it holds only what training changed, on top of {wanted}; give that weights file "
        "(--base FILE; base=Path(...) in Python)"
    )


def refuse_too_small(path: Path, wanted: str, missing: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a file can't hold so many numbers, before memory is taken for a network that has them.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "base.pth").write_bytes(bytes(99))
    ...     refuse_too_small(Path(folder, "base.pth"), "resnet18 with weights", {"weight": Tensor(100)})
    Traceback (most recent call last):
    ...
    ValueError: ...base.pth: its 99 bytes can't hold the 100 numbers of resnet18 with weights; ...
    """
    numbers = sum(tensor.numel() for tensor in missing.values())
    # A number takes a byte at least.
    if path.is_file() and (size := path.stat().st_size) < numbers:
        raise ValueError(
            f"{path}: its {size:,} bytes can't hold the {numbers:,} numbers of {wanted}; "
            "give the weights file that the model was trained on (--base FILE; base=Path(...) in Python)"
        )
