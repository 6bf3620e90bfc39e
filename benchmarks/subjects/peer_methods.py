"""How each library freezes a timm network except its classifier, as in its own documentation.

Each function takes a bare network, which it may change, and returns the module to train. The libraries are imported
where they are used: if one is not installed, only its own row is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.utils.model import freeze, unfreeze
from torch import nn

from backbone_finetune import FineTuneModel


@dataclass(frozen=True)
class Blueprint:
    """The network that every method starts from: architecture, weights, and where its classifier is."""

    name: str
    network: nn.Module
    classifier: str  # dotted path, such as `head.fc`
    image_size: int

    def split(self, network: nn.Module) -> nn.Sequential:
        """Return a sequence of backbone and classifier, for fastai's splitters and Lightning's `pl_module.backbone`."""
        classifier = network.get_submodule(self.classifier)
        network.reset_classifier(0)  # type: ignore[operator]
        return nn.Sequential(network, classifier)


@dataclass(frozen=True)
class Method:
    """A way to freeze, the package whose version is recorded, and the prefix of the backbone in state dicts."""

    label: str
    freeze: Callable[[Blueprint, nn.Module], nn.Module]
    package: str
    prefix: str = ""
    note: str = ""


def unfrozen(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """Train everything."""
    return network


def article_recipe(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """Freeze each parameter whose name does not contain the classifier's."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad = blueprint.classifier in name
    return network


def timm_freeze(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """Freeze everything, including running statistics, then unfreeze the classifier."""
    freeze(network)  # type: ignore[no-untyped-call]
    unfreeze(network, [blueprint.classifier])  # type: ignore[no-untyped-call]
    return network


def fastai_freeze(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """`Learner.freeze` with its defaults, which keep normalisation layers trainable (`train_bn=True`)."""
    from fastai.data.core import DataLoaders  # noqa: PLC0415
    from fastai.learner import Learner  # noqa: PLC0415

    module = blueprint.split(network)
    learner = Learner(
        DataLoaders(),
        module,
        loss_func=nn.CrossEntropyLoss(),
        splitter=lambda parts: [list(part.parameters()) for part in parts],
    )
    learner.freeze()
    return module


def lightning_freeze(*, train_bn: bool) -> Callable[[Blueprint, nn.Module], nn.Module]:
    """`BaseFinetuning.freeze`, as `BackboneFinetuning` calls it on `pl_module.backbone` (`train_bn=True`)."""

    def method(blueprint: Blueprint, network: nn.Module) -> nn.Module:
        from lightning.pytorch.callbacks import BaseFinetuning  # noqa: PLC0415

        module = blueprint.split(network)
        BaseFinetuning.freeze(module[0], train_bn=train_bn)
        return module

    return method


def open_clip_lock(*, freeze_bn_stats: bool) -> Callable[[Blueprint, nn.Module], nn.Module]:
    """`TimmModel.lock`, as `lock_image_tower` calls it; `freeze_bn_stats` is False by default."""

    def method(blueprint: Blueprint, network: nn.Module) -> nn.Module:
        from open_clip.timm_model import TimmModel  # noqa: PLC0415

        backbone, classifier = blueprint.split(network)
        # An empty pool keeps the network's own; a linear projection with a bias is its classifier.
        module: nn.Module = TimmModel(blueprint.name, classifier.out_features, pool="", proj_bias=True)
        if hasattr(module.trunk, "set_input_size"):
            module.set_input_size(blueprint.image_size)  # type: ignore[operator]
        module.get_submodule("trunk").load_state_dict(backbone.state_dict())
        module.get_submodule("head.proj").load_state_dict(classifier.state_dict())
        module.lock(freeze_bn_stats=freeze_bn_stats)  # type: ignore[operator]
        return module

    return method


def peft_modules_to_save(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """`modules_to_save` and no adapter elsewhere."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from peft.utils.constants import DUMMY_TARGET_MODULES  # noqa: PLC0415

    # PEFT refuses a configuration without target modules; this name of its own stands for none.
    configuration = LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=[blueprint.classifier])
    module: nn.Module = get_peft_model(network, configuration)
    return module


def ours(blueprint: Blueprint, network: nn.Module) -> nn.Module:
    """Wrap the network with its own classifier, and freeze."""
    return FineTuneModel.from_timm(network).freeze_backbone()


METHODS = (
    Method("plain PyTorch, unfrozen", unfrozen, "torch"),
    Method("the article's recipe", article_recipe, "torch"),
    Method("timm.utils.freeze", timm_freeze, "timm"),
    Method("fastai Learner.freeze", fastai_freeze, "fastai", "0."),
    Method("Lightning freeze, train_bn=True", lightning_freeze(train_bn=True), "lightning", "0."),
    Method(
        "Lightning freeze, train_bn=False",
        lightning_freeze(train_bn=False),
        "lightning",
        "0.",
        note="a BatchNorm then normalises by each batch's own statistics",
    ),
    Method("open_clip lock", open_clip_lock(freeze_bn_stats=False), "open_clip_torch", "trunk."),
    Method("open_clip lock, freeze_bn_stats", open_clip_lock(freeze_bn_stats=True), "open_clip_torch", "trunk."),
    Method(
        "PEFT modules_to_save",
        peft_modules_to_save,
        "peft",
        "base_model.model.",
        note="by its internal name for no targets: it refuses modules_to_save alone",
    ),
    Method("ours", ours, "backbone-finetune", "backbone."),
)


def make_blueprint(name: str, num_classes: int, image_size: int, arguments: dict[str, Any]) -> Blueprint:
    """Build the network that all methods start from; raise ValueError if its classifier is not one layer."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=num_classes, **arguments)
    config = timm.get_pretrained_cfg(name)
    path = config.classifier if config is not None else None
    if not isinstance(path, str):
        raise ValueError(f"{name}: its classifier is {path}; the methods compared here freeze all but a single layer.")
    return Blueprint(name, network, path, image_size)
