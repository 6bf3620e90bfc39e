"""What of a transformer's tokens the features are, and building a model from its network, readout and classifier."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import timm
import torch
from timm.models import get_model_args
from torch import nn

from backbone_finetune import FineTuneModel, TokenReadout
from backbone_finetune.splitting.heads import add_dropout

from ..text import one_line

Readout = Literal["token", "mean", "token-mean", "last-4-blocks", "last-4-blocks-mean"]
POOLS = {"token": "token", "mean": "avg"}
# The arguments of timm's networks that say how tokens are pooled, and whether before or after the last norm.
POOLING_ARGUMENTS = ("global_pool", "fc_norm", "use_fc_norm")


def choose_readout(
    readout: Readout, network: nn.Module, architecture: str, arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Choose what a network's features are: by timm's own pooling, which changes it in place, or by a `TokenReadout`.

    >>> choose_readout("mean", timm.create_model("test_vit"), "test_vit", {})
    ({'global_pool': 'avg', 'fc_norm': False}, None)
    >>> choose_readout("last-4-blocks", timm.create_model("test_vit"), "test_vit", {})
    ({}, {'blocks': 4, 'patch_mean': False})

    Args:
        readout: The name of the readout.
        network: A timm network.
        architecture: Its name.
        arguments: The arguments that it was built with.

    Returns:
        The arguments to build the network again, and those of `TokenReadout`, or None.

    Raises:
        ValueError: the network does not support it.
    """
    if readout not in POOLS:
        blocks = 4 if readout.startswith("last-4") else 1
        return dict(arguments), {"blocks": blocks, "patch_mean": readout.endswith("mean")}
    pool, reset = POOLS[readout], cast(Any, network).reset_classifier
    try:
        reset(0, global_pool=pool)
        found = get_model_args(network)
        if found.get("global_pool") != pool:
            raise ValueError(f"its pooling stays {found.get('global_pool')!r}")
        again = {**arguments, **{name: found[name] for name in POOLING_ARGUMENTS if name in found}}
        with torch.device("meta"):
            plain: Any = timm.create_model(architecture, **again)
        plain.reset_classifier(0)
        if _outline(plain) != _outline(network):
            raise ValueError(f"timm builds another network with {again}")
    except Exception as error:  # networks raise AssertionError, TypeError and others for a pooling they do not have
        raise ValueError(
            f"{architecture} has no readout {readout!r} ({one_line(error, most=200)}); leave out --readout, which "
            "keeps the network's own pooling"
        ) from error
    return again, None


def _outline(network: nn.Module) -> tuple[dict[str, type[nn.Module]], dict[str, torch.Size]]:
    """Return the classes of a network's modules, and the shapes of its tensors."""
    modules = {name: type(module) for name, module in network.named_modules()}
    return modules, {name: tensor.shape for name, tensor in network.state_dict().items()}


def assemble(
    network: str | nn.Module,
    num_classes: int,
    *,
    readout: Mapping[str, Any] | None = None,
    classifier: nn.Module | Callable[[int], nn.Module] | None = None,
    norm_eval: bool = False,
    **arguments: Any,
) -> FineTuneModel:
    """Build a model from a network, or an architecture and its arguments, the arguments of its readout, and a head.

    >>> assemble("test_vit", 2, readout={"blocks": 2, "patch_mean": True}).classifier
    Linear(in_features=192, out_features=2, bias=True)
    """
    if readout is None:
        head: dict[str, Any] = {"num_classes": num_classes} if classifier is None else {"classifier": classifier}
        return FineTuneModel.from_timm(network, **head, norm_eval=norm_eval, **arguments)
    drop_rate = arguments.pop("drop_rate", None)
    backbone = TokenReadout(timm.create_model(network, **arguments) if isinstance(network, str) else network, **readout)
    if classifier is None:
        chosen: nn.Module = nn.Linear(backbone.num_features, num_classes)
    else:
        chosen = classifier if isinstance(classifier, nn.Module) else classifier(backbone.num_features)
    if drop_rate:
        add_dropout(chosen, drop_rate)
    return FineTuneModel(backbone, chosen, norm_eval=norm_eval)


def describe_readout(backbone: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of a `TokenReadout` as the metadata of a model file; None for any other backbone.

    >>> describe_readout(TokenReadout(timm.create_model("test_vit"), blocks=4))
    {'blocks': 4, 'patch_mean': False}
    """
    if not isinstance(backbone, TokenReadout):
        return None
    return {"blocks": backbone.blocks, "patch_mean": backbone.patch_mean}
