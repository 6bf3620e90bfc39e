"""The base weights of a file of changes, which holds only what training changed."""

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
from .foreign import load_checkpoint_network
from .metadata import BaseReference, ModelDescription
from .readouts import POOLING_ARGUMENTS, assemble
from .weights import PACKAGED_ARCHITECTURE, Source, load_packaged_network


@dataclass(frozen=True)
class BaseWeights:
    """Where the weights of a backbone came from, for the machine and in words, and a digest of each of its tensors."""

    source: Literal["package", "hub", "file"]
    words: str
    digests: Mapping[str, str]

    def find_kept(self, model: FineTuneModel) -> set[str]:
        """Name the tensors of a model's backbone that training left as they were."""
        return {name for name, digest in _digest_backbone(model).items() if self.digests[name] == digest}

    def refer(self, kept: Iterable[str]) -> BaseReference:
        """Name the base that a file of changes needs, which leaves out the tensors that are kept."""
        words = printable(self.words.encode(errors="backslashreplace").decode())[:200]
        fingerprint = _fingerprint({name: self.digests[name] for name in kept})
        return BaseReference(source=self.source, words=words, fingerprint=fingerprint)


def remember_base(model: FineTuneModel, source: Source, words: str) -> BaseWeights:
    """Digest a backbone before its training, so that ``save_trained_changes`` can find what changed.

    ``source`` and ``words`` are from ``load_network``. Raises ValueError for random weights.
    """
    if source == "random":
        raise ValueError(
            "the backbone starts from random weights, which cannot be built again below what was trained; "
            "choose --pretrained or --checkpoint FILE, or leave out --trainable-only"
        )
    return BaseWeights(source, words, _digest_backbone(model))


def find_base(description: ModelDescription, missing: Iterable[str], path: Path | None) -> dict[str, Tensor]:
    """Load the base weights of a file of changes, and check their fingerprint.

    Without a ``path`` they are in the package or in the hub's cache on this machine; nothing is downloaded.
    """
    architecture, base = description.architecture, description.base
    assert base is not None  # a file without a base must have all tensors, which was checked before
    wanted = f"{architecture} with {base.words}"
    give = "give the weights file that it was trained on (--base FILE; base=Path(...) in Python)"
    # The dropout before the classifier is not part of the backbone.
    arguments = {name: value for name, value in description.given_arguments.items() if name != "drop_rate"}
    if path is None and base.source == "package" and architecture == PACKAGED_ARCHITECTURE:
        network = load_packaged_network(**arguments)
    # A file may be untrusted: it must not start a download, and a path in it is not opened.
    elif file := path or (_find_cached_weights(architecture) if base.source == "hub" else None):
        plain = {name: value for name, value in arguments.items() if name not in POOLING_ARGUMENTS}
        try:
            network = load_checkpoint_network(architecture, file, **arguments)
        except ValueError:
            if plain == arguments:
                raise
            # A readout replaced the network's own pooling, whose weights are in the file.
            network = load_checkpoint_network(architecture, file, **plain)
    else:
        if base.source == "hub":
            give = (
                "they are not in the cache of the hub on this machine, and a model file starts no download; fetch them "
                f"with timm.create_model({architecture!r}, pretrained=True) in Python, or {give}"
            )
        raise ValueError(f"it holds only what training changed, on top of {wanted}; {give}")
    model = assemble(network, len(description.class_names), readout=description.given_readout)
    tensors = distinct_tensors(model)
    rest = {name: tensors[name] for name in missing if name in tensors}
    found = _fingerprint({name: digest(tensor) for name, tensor in rest.items()})
    if found != base.fingerprint:
        raise ValueError(
            f"it was trained on top of {wanted} (fingerprint {base.fingerprint[:12]}), and "
            f"{path or 'what is found there now'} is another base ({found[:12]}); {give}"
        )
    return rest


def _find_cached_weights(architecture: str) -> Path | None:
    """Find timm's pretrained weights in the hub's cache."""
    config = timm.get_pretrained_cfg(architecture)
    if config is None or not config.hf_hub_id:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    # timm's own order; its registry may name another file.
    names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _digest_backbone(model: FineTuneModel) -> dict[str, str]:
    """Digest the bits, dtype and shape of each tensor of a backbone, by the model's own names."""
    tensors = distinct_tensors(model)
    return {name: digest(tensor) for name, tensor in tensors.items() if name.startswith("backbone.")}


def _fingerprint(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
