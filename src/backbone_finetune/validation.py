"""Checks of the arguments of FineTuneModel, made before anything is built."""

from __future__ import annotations

import difflib
import sys
from typing import cast

import timm
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_module(module: object, name: str, origin: str) -> None:
    """Check that an argument is a module, and neither compiled nor wrapped in DistributedDataParallel.

    >>> check_module("resnet18", "backbone", "FineTuneModel")
    Traceback (most recent call last):
    ...
    TypeError: FineTuneModel: backbone='resnet18'; pass a torch.nn.Module (by name: FineTuneModel.from_timm(...)).

    Raises:
        TypeError: it is not a module.
        ValueError: it is compiled or wrapped.
    """
    if not isinstance(module, nn.Module):
        by_name = " (by name: FineTuneModel.from_timm(...))" if isinstance(module, str) else ""
        raise TypeError(f"{origin}: {name}={module!r}; pass a torch.nn.Module{by_name}.")
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # if it was never imported, nothing is compiled
    if compiler is not None and isinstance(module, compiler.OptimizedModule):
        raise ValueError(
            f"{origin}: the {name} is compiled, so its layer groups cannot be found; pass the network itself, and "
            "compile the FineTuneModel: freeze, wrap, compile."
        )
    if isinstance(module, DistributedDataParallel):
        raise ValueError(
            f"{origin}: the {name} is wrapped in DistributedDataParallel; pass the network itself (its .module), and "
            "wrap the FineTuneModel: freeze, wrap, compile."
        )


def check_network(model: object) -> None:
    """Check that an argument is the name of an architecture or a network.

    >>> check_network(None)
    Traceback (most recent call last):
    ...
    TypeError: from_timm: model=None; pass the name of an architecture (timm.list_models()) or a timm network.

    Raises:
        TypeError: it is neither.
        ValueError: the name is empty, or the network is compiled or wrapped.
    """
    if model == "" or not isinstance(model, (str, nn.Module)):
        raise (ValueError if isinstance(model, str) else TypeError)(
            f"from_timm: model={model!r}; pass the name of an architecture (timm.list_models()) or a timm network."
        )
    if isinstance(model, nn.Module):
        check_module(model, "network", "from_timm")


def check_shares_nothing(backbone: nn.Module, classifier: nn.Module) -> None:
    """Raise ValueError if both parts share a parameter.

    >>> check_shares_nothing(nn.Linear(2, 2), nn.Linear(2, 2))
    """
    inside = {id(parameter): name for name, parameter in backbone.named_parameters()}
    for name, parameter in classifier.named_parameters():
        if id(parameter) in inside:
            raise ValueError(
                f"FineTuneModel: backbone.{inside[id(parameter)]} and classifier.{name} are one parameter, which "
                "cannot be frozen and trained at once; copy it, e.g. with copy.deepcopy(classifier)."
            )


def check_drop_rate(drop_rate: object) -> None:
    """Raise ValueError unless the dropout rate is None or a number from 0 to 1.

    >>> check_drop_rate(1.5)
    Traceback (most recent call last):
    ...
    ValueError: from_timm: drop_rate=1.5; pass a number from 0 to 1, or leave it out.
    """
    is_number = isinstance(drop_rate, (int, float)) and not isinstance(drop_rate, bool)
    if drop_rate is not None and not (is_number and 0 <= cast(float, drop_rate) <= 1):
        raise ValueError(f"from_timm: drop_rate={drop_rate!r}; pass a number from 0 to 1, or leave it out.")


def check_architecture(name: str) -> None:
    """Raise ValueError unless timm has an architecture and, if the name has one, its weights tag.

    >>> check_architecture("resnet18.a1_in1k")
    >>> check_architecture("resnet81")
    Traceback (most recent call last):
    ...
    ValueError: resnet81: timm ... has no such architecture; the nearest names are ...resnet18...
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f"the nearest names are {', '.join(nearest)}" if nearest else "timm.list_models() lists all names"
        raise ValueError(f"{name}: timm {timm.__version__} has no such architecture; {hint}.")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = f"its tags are {', '.join(tags)}" if tags else "it has no pretrained weights"
        raise ValueError(f"{name}: {architecture} has no weights tagged {tag!r}; {known}.")
