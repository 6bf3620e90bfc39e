"""Weights files of other trainers: nested state dicts, names with the prefix of a wrapper, and timm's own formats."""

import argparse
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import PretrainedCfg, clean_state_dict
from torch import Tensor, nn
from torch.serialization import safe_globals

from backbone_finetune.names import shortened

from ..files import check_file
from ..text import one_line

WANTED = "pass a file of weights"
NESTED = ("state_dict_ema", "model_ema", "model_state_dict", "state_dict", "model", "net", "weights")


def load_checkpoint_network(architecture: str, path: Path, **arguments: Any) -> nn.Module:
    """Build an architecture with the weights of a file on disk, in any format that `read_weights` or timm knows for it.

    The file must contain this network. Its classifier may have any number of classes, or be missing, and its first
    layer may have timm's own number of channels in place of ``in_chans``; no other tensor may be missing, unexpected
    or of another shape.
    """
    with torch.device("meta"):
        wanted = timm.create_model(architecture, **arguments).state_dict()
    tensors = read_weights(path, wanted)
    defaults = timm.get_pretrained_cfg(architecture) or PretrainedCfg()
    size = defaults.input_size
    first, own = (_find_weight(state, defaults.first_conv) for state in (tensors, wanted))
    if first is not None and own is not None and first.ndim == own.ndim == 4:
        images = arguments.get("in_chans", size[0])
        channels = first.shape[1] * images // own.shape[1]  # of the file; a stem that folds pixels has a multiple
        if channels not in {images, size[0]}:
            raise ValueError(f"{path}: its first layer takes images of {channels} channels; pass --in-chans {channels}")
        size = (channels, *size[1:])
    # timm loads strictly only with equal numbers of classes, so build the network with those of the file.
    # Without a classifier under timm's name, the file is in its authors' own format (timm translates it, and it
    # has the usual classes) or has none.
    classifier = _find_weight(tensors, defaults.classifier)
    problem: Exception | None = None
    for num_classes in (len(classifier),) if classifier is not None and classifier.ndim else (defaults.num_classes, 0):
        config = {"num_classes": num_classes, "input_size": size, "label_offset": 0}
        try:
            return create_with_weights(architecture, tensors, config, num_classes=num_classes, **arguments)
        except Exception as error:  # timm's converters may raise any error for a foreign file
            problem = error
    raise ValueError(
        f"{path}: these are not the weights of {architecture}: the file has {_list_names(tensors)}, and expected "
        f"are {_list_names(wanted)}; pass the architecture of the file with --model, or weights of this one "
        f"({one_line(problem, most=200)})"
    ) from problem


def create_with_weights(
    architecture: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], **arguments: Any
) -> nn.Module:
    """Build an architecture with a state dict, which timm converts and adapts to the ``arguments``.

    ``config`` says what the weights were trained for, by the names of timm's ``PretrainedCfg``.
    """
    overlay = {**config, "state_dict": dict(tensors)}  # timm takes some tensors out
    network = timm.create_model(architecture, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    own: Any = network.pretrained_cfg
    del own["state_dict"]  # it would keep these weights in memory
    return network


def read_weights(path: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Read a weights file, and give its tensors the ``names`` of an architecture.

    A state dict inside a checkpoint is found under common keys of trainers, and the prefix that most of the
    network's tensors have in the file is removed: Lightning's ``model.``, DistributedDataParallel's ``module.``, or
    the ``backbone.`` of a `FineTuneModel`. Tensors without it are then left out: they are not part of the network.

    Names of a format that timm converts do not change.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or contains no state dict.
    """
    found = _read_file(path)
    while nested := [found[key] for key in NESTED if isinstance(found.get(key), Mapping)]:
        found = nested[0]
    tensors = clean_state_dict(
        {name: tensor for name, tensor in found.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    )
    if not tensors:
        entries = [f"{one_line(name)} ({type(value).__name__})" for name, value in found.items()]
        raise ValueError(
            f"{path}: it has no tensors at its top, nor below {', '.join(NESTED)}; its entries are "
            f"{shortened(entries, most=10) or 'none'}; write its state dict to a file of its own, and pass that"
        )
    prefix = _find_prefix(tensors, names)
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read_file(path: Path) -> Any:
    """Read a dictionary from a file of safetensors or torch. No code in it is run."""
    check_file(path, WANTED)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals([argparse.Namespace]):  # the options of timm's train.py
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler may raise any error for a file that is not a pickle
        if blocked := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path}: it holds an object of {blocked[1]}, and no code that a file names is run; if you trust it, "
                "write its state dict, from torch.load(..., weights_only=False), to a file of its own, and pass that"
            ) from error
        with path.open("rb") as file:
            start = file.read(32)
        raise ValueError(
            f"{path}: not a readable weights file of torch or safetensors: its {path.stat().st_size:,} bytes begin "
            f"with {str(start)[1:]}"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: it holds an object of {type(found).__name__}, and a state dict was expected")
    return found


def _find_weight(tensors: Mapping[str, Tensor], layers: str | Collection[str] | None) -> Tensor | None:
    """Return the weight of the first of some layers that is among tensors, if one is."""
    layers = (layers,) if isinstance(layers, str) else layers or ()
    return next((tensors[f"{layer}.weight"] for layer in layers if f"{layer}.weight" in tensors), None)


def _find_prefix(tensors: Iterable[str], names: Collection[str]) -> str:
    """Return the prefix with which most of the names are among the tensors; "" if there is none."""
    known = set(names)
    counts = Counter(
        name[: position + 1]
        for name in tensors
        for position, character in enumerate(name)
        if character == "." and name[position + 1 :] in known
    )
    prefix, count = counts.most_common(1)[0] if counts else ("", 0)
    return prefix if count > max(len(known) // 2, len(known & set(tensors))) else ""


def _list_names(names: Iterable[str]) -> str:
    return shortened([one_line(name, most=60) for name in names])
