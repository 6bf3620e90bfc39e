"""What a network was before its training: where its weights came from, and how to recognise them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
from huggingface_hub import try_to_load_from_cache  # it comes with timm
from torch import Tensor

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import distinct_tensors
from backbone_finetune.verification import digest

from ..text import printable
from .metadata import BaseReference, ModelDescription
from .weights import PACKAGED_ARCHITECTURE, Source, load_checkpoint_network, load_packaged_network

__all__ = ["BaseWeights", "digest_backbone", "find_base", "refer_to_base", "remember_base"]


@dataclass(frozen=True)
class BaseWeights:
    """Where the weights of a backbone came from, for the machine and in words, and a digest of each of its tensors."""

    source: Literal["package", "hub", "file"]
    words: str
    digests: Mapping[str, str]


def remember_base(model: FineTuneModel, source: Source, words: str) -> BaseWeights:
    """Digest a backbone before its training, so that ``save_trained_changes`` can tell what changed.

    ``source`` and ``words`` are what ``load_network`` returned.

    Raises:
        ValueError: the weights are random; such a base cannot be built again.
    """
    if source == "random":
        raise ValueError(
            "the backbone starts from random weights, which cannot be built again below what was trained; "
            "choose --pretrained or --checkpoint FILE, or leave out --trainable-only"
        )
    return BaseWeights(source, words, digest_backbone(model))


def digest_backbone(model: FineTuneModel) -> dict[str, str]:
    """Digest the bits, dtype and shape of each tensor of a backbone, by the model's own names."""
    return {name: digest(tensor) for name, tensor in _backbone_tensors(model).items()}


def refer_to_base(base: BaseWeights, kept: Iterable[str]) -> BaseReference:
    """Name the base that a file of changes needs; ``kept`` are the tensors that training left as they were."""
    words = printable(base.words.encode(errors="backslashreplace").decode())[:200]
    return BaseReference(
        source=base.source, words=words, fingerprint=_fingerprint({name: base.digests[name] for name in kept})
    )


def find_base(description: ModelDescription, missing: Iterable[str], path: Path | None) -> dict[str, Tensor]:
    """Load the base weights that a file of changes leaves out, and check that they are the right ones.

    Without a ``path`` they are in the package or in the hub's cache on this machine; nothing is downloaded.
    """
    architecture, base = description.architecture, description.base
    assert base is not None  # tensors that a file without a base leaves out are refused before
    wanted = f"{architecture} with {base.words}"
    # The dropout before the classifier is no part of the backbone.
    arguments = {name: value for name, value in description.given_arguments.items() if name != "drop_rate"}
    if path is None and base.source == "package" and architecture == PACKAGED_ARCHITECTURE:
        network = load_packaged_network(**arguments)
    # A file may be a stranger's: it starts no download, and a path that it names is not opened.
    elif file := path or (_find_cached_weights(architecture) if base.source == "hub" else None):
        network = load_checkpoint_network(architecture, file, **arguments)
    else:
        fetch = (
            "they are not in the cache of the hub on this machine, and a model file starts no download; fetch them "
            f"with timm.create_model({architecture!r}, pretrained=True) in Python, or "
        )
        raise ValueError(
            f"it holds only what training changed, on top of {wanted}; {fetch if base.source == 'hub' else ''}give "
            "that weights file (--base FILE; base=Path(...) in Python)"
        )
    tensors = _backbone_tensors(FineTuneModel.from_timm(network, num_classes=len(description.class_names)))
    rest = {name: tensors[name] for name in missing if name in tensors}
    found = _fingerprint({name: digest(tensor) for name, tensor in rest.items()})
    if found != base.fingerprint:
        raise ValueError(
            f"it was trained on top of {wanted} (fingerprint {base.fingerprint[:12]}), and "
            f"{path or 'what is found there now'} is another base ({found[:12]}); "
            "give the weights file that it was trained on (--base FILE; base=Path(...) in Python)"
        )
    return rest


def _find_cached_weights(architecture: str) -> Path | None:
    """Find timm's pretrained weights where an earlier download from the hub left them."""
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    # timm's own order; its registry may name another file.
    names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _backbone_tensors(model: FineTuneModel) -> dict[str, Tensor]:
    """Return what a file holds of a model's backbone, by the model's own names."""
    return {name: tensor for name, tensor in distinct_tensors(model).items() if name.startswith("backbone.")}


def _fingerprint(digests: Mapping[str, str]) -> str:
    """Digest digests by name."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
