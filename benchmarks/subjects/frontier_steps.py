"""The steps that are compared on one partly frozen network: whole, on the frontier, and the rest written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import Frontier, find_frontier
from subjects.networks import build_network


@dataclass(frozen=True)
class Blueprint:
    """A network, how many of its layer groups train, and the hand-written rest after its kept tensor."""

    trainable_groups: int
    rest: Callable[[Any, Tensor], Tensor]
    fewest_times_faster: tuple[float, float]  # than the article's recipe over 20 epochs, in float32 and in bf16


def _after_layer3(model: Any, features: Tensor) -> Tensor:
    backbone = model.backbone
    pool = getattr(backbone, "global_pool", None)
    features = backbone.layer4(features)
    logits: Tensor = model.classifier(pool(features) if pool is not None else backbone.avgpool(features).flatten(1))
    return logits


def _after_block_9(model: Any, features: Tensor) -> Tensor:
    logits: Tensor = model.classifier(model.backbone.norm(model.backbone.blocks[10:](features))[:, 0])
    return logits


BLUEPRINTS = {
    "PretrainedResNet": Blueprint(1, _after_layer3, (3.0, 5.0)),
    "resnet18": Blueprint(1, _after_layer3, (2.6, 4.9)),
    "resnet50": Blueprint(1, _after_layer3, (2.3, 4.0)),
    "vit_small_patch16_224": Blueprint(2, _after_block_9, (1.6, 2.5)),
}


class Steps:
    """Four training steps on the same images; each leaves the weights as they are (a learning rate of 0)."""

    def __init__(self, name: str, batch_size: int, image_size: int, bf16: bool) -> None:
        blueprint = BLUEPRINTS[name]
        network = build_network(name, batch_size=batch_size, image_size=image_size, device=torch.device("cpu"))
        self.images = torch.randn(batch_size, 3, image_size, image_size)  # the article's network takes any size
        self.labels, self.bf16 = network.labels, bf16
        self.model: FineTuneModel = network.model
        self.model.freeze_backbone(trainable_groups=blueprint.trainable_groups).train()
        # The article freezes parameters, and leaves every module in train mode; it knows no autocast.
        self.of_the_recipe = copy.deepcopy(self.model)
        for module in self.of_the_recipe.modules():
            module.training = True
        self.by_hand = blueprint.rest
        self.frontier = self.find()
        self.tensors = self.record()

    def find(self) -> Frontier:
        with self._autocast():
            found = find_frontier(self.model, self.images)
        if not isinstance(found, Frontier):
            raise ValueError(found.reason)
        return found

    def record(self) -> tuple[Tensor, ...]:
        with self._autocast():
            return self.frontier.record(self.images)

    def recipe(self) -> None:
        self._step(self.of_the_recipe, lambda: self.of_the_recipe(self.images), bf16=False)

    def whole(self) -> None:
        self._step(self.model, lambda: self.model(self.images), bf16=self.bf16)

    def cached(self) -> None:
        self._step(self.model, lambda: self.frontier.replay(self.tensors), bf16=self.bf16)

    def rest(self) -> None:
        self._step(self.model, lambda: self.by_hand(self.model, self.tensors[0]), bf16=self.bf16)

    def _step(self, model: nn.Module, forward: Callable[[], Tensor], *, bf16: bool) -> None:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trainable:
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(forward(), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(trainable, lr=0.0).step()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)
