"""The work that is compared on one partly frozen network: whole steps, steps on the frontier, and the rest by hand."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness.timing import Clock, TrainingStep
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from backbone_finetune.frontier import Frontier, find_frontier
from subjects.equality import compare
from subjects.networks import Network, article_module, build_network
from subjects.variants import Precision, autocast, training_step

STORED_BATCHES = 8  # more than a cache of the processor holds, as a stored data set is


@dataclass(frozen=True)
class Blueprint:
    """A network, how many of its layer groups train, its rest written by hand, and what is expected of it.

    `words` name what trains to the article's recipe. `rest` takes a `FineTuneModel` and the tensor that is kept for a
    batch, and gives the logits. `times_faster` is the least by which 20 epochs on the frontier are to be faster than
    the article's recipe, by precision.
    """

    network: str
    trainable_groups: int
    words: tuple[str, ...]
    rest: Callable[[Any, Tensor], Tensor]
    times_faster: Mapping[Precision, float]


def _after_layer3(model: Any, features: Tensor) -> Tensor:
    """A ResNet of timm, whose pooling flattens, or one of the article."""
    features = model.backbone.layer4(features)
    if hasattr(model.backbone, "global_pool"):
        return model.classifier(model.backbone.global_pool(features))  # type: ignore[no-any-return]
    return model.classifier(model.backbone.avgpool(features).flatten(1))  # type: ignore[no-any-return]


def _after_vit_block_9(model: Any, features: Tensor) -> Tensor:
    return model.classifier(model.backbone.norm(model.backbone.blocks[10:](features))[:, 0])  # type: ignore[no-any-return]


def _after_efficientnet_stage(stage: int) -> Callable[[Any, Tensor], Tensor]:
    def rest(model: Any, features: Tensor) -> Tensor:
        backbone = model.backbone
        features = backbone.bn2(backbone.conv_head(backbone.blocks[stage + 1 :](features)))
        return model.classifier(backbone.global_pool(features))  # type: ignore[no-any-return]

    return rest


_RESNET, _VIT = ("fc", "layer4"), ("blocks.10.", "blocks.11.", "norm.", "head.")
_EFFICIENTNET = ("blocks.6.", "conv_head.", "bn2.", "classifier.")
BLUEPRINTS = {
    "PretrainedResNetVariation": Blueprint(
        "PretrainedResNetVariation", 1, _RESNET, _after_layer3, {"off": 3.0, "bf16": 5.0}
    ),
    "resnet50": Blueprint("resnet50", 1, _RESNET, _after_layer3, {"off": 2.3, "bf16": 4.0}),
    "vit_small_patch16_224": Blueprint("vit_small_patch16_224", 2, _VIT, _after_vit_block_9, {"off": 1.6, "bf16": 2.5}),
    # The target was set when the head was a layer group of its own: blocks.6 and the head, which are one group today.
    "tf_efficientnet_lite0": Blueprint(
        "tf_efficientnet_lite0", 1, _EFFICIENTNET, _after_efficientnet_stage(5), {"off": 10.0, "bf16": 18.0}
    ),
    "tf_efficientnet_lite0, 2 groups": Blueprint(
        "tf_efficientnet_lite0",
        2,
        ("blocks.5.", *_EFFICIENTNET),
        _after_efficientnet_stage(4),
        {"off": 1.0, "bf16": 1.0},
    ),
    # Small, to see that all of it runs.
    "test_resnet": Blueprint("test_resnet", 1, _RESNET, _after_layer3, {"off": 1.0, "bf16": 1.0}),
}


def build_partly_frozen(
    name: str, trainable_groups: int, batch_size: int, image_size: int, device: torch.device
) -> Network:
    """Build a network whose last groups train, with a batch of random images of this very size."""
    network = build_network(name, batch_size=batch_size, image_size=image_size, device=device)
    network.model.freeze_backbone(trainable_groups=trainable_groups).train()
    # build_network gives the article's networks 64 pixels; those here take any size.
    return replace(network, images=torch.randn(batch_size, 3, image_size, image_size, device=device))


def recipe_step(network: Network, words: Collection[str] | None = None) -> TrainingStep:
    """Make the article's step: parameters frozen by name, every module in train mode, float32.

    Each parameter trains whose name holds one of `words`; without them, those that train in `network`. It runs on a
    copy, as its running statistics move, which is the plain network again with nothing of ours around it.
    """
    plain = copy.deepcopy(network.model).to_module().train()
    if words is not None:
        article_module().freeze_by_name(plain, words)
    return training_step(
        lambda: cross_entropy(plain(network.images), network.labels), trainable_of(plain), network.images.device
    )


def names_take_more(network: Network, words: Collection[str]) -> bool:
    """Return whether the recipe's words are in the names of other parameters than those that train in `network`."""
    plain = copy.deepcopy(network.model).to_module()
    return any(
        parameter.requires_grad != any(word in name for word in words) for name, parameter in plain.named_parameters()
    )


class FrontierWork:
    """The work on one network in one precision; steps leave the weights as they are.

    The frontier is found and timed when this is made, and what trains on it is proved to be what trains without it.
    """

    def __init__(self, network: Network, rest: Callable[[Any, Tensor], Tensor], precision: Precision, clock: Clock):
        self.network = network
        self.precision: Precision = precision
        self._by_hand = rest
        self._moments: defaultdict[Tensor, Any] = defaultdict(dict)
        self.frontier, self.find_ms = clock.time(self.find)
        self.ready = self._record()
        self.prove()
        self.store = [rows.repeat(STORED_BATCHES, *[1] * (rows.ndim - 1)) for rows in self.ready]
        self.whole = self._step(lambda: network.model(network.images))
        self.cached = self._step(lambda: self.frontier.replay(self.draw_batch()))
        self.rest = self._step(lambda: rest(network.model, *self.ready))

    @property
    def bytes_per_image(self) -> int:
        """How much is kept for each image."""
        return sum(rows[0].nbytes for rows in self.ready)

    def find(self) -> Frontier:
        """Find the frontier on the batch; ValueError where there is none."""
        with autocast(self.network.images.device, self.precision):
            found = find_frontier(self.network.model, self.network.images)
        if not isinstance(found, Frontier):
            raise ValueError(f"no frontier: {found.reason}")
        return found

    def record_and_store(self) -> None:
        """Compute what is kept for the batch, and write it into the store."""
        for stored, rows in zip(self.store, self._record(), strict=True):
            stored[: len(rows)] = rows

    def draw_batch(self) -> list[Tensor]:
        """Take the rows of a random batch out of the store, as an epoch does."""
        batch_size = len(self.network.images)
        picks = torch.randperm(STORED_BATCHES * batch_size)[:batch_size].to(self.network.images.device)
        return [stored[picks] for stored in self.store]

    def prove(self) -> None:
        """Raise WrongVariantError unless frontier and rest by hand give the whole network's logits and gradients."""
        model = self.network.model
        expected = self._logits_and_gradients(lambda: model(self.network.images))
        for what, forward in (
            ("the frontier", lambda: self.frontier.replay(self.ready)),
            ("the rest by hand", lambda: self._by_hand(model, *self.ready)),
        ):
            for part, value, wanted in zip(
                ("logits", "gradients"), self._logits_and_gradients(forward), expected, strict=True
            ):
                compare(f"{what}, {part}", value, wanted, self.precision)

    def _record(self) -> tuple[Tensor, ...]:
        with autocast(self.network.images.device, self.precision):
            return self.frontier.record(self.network.images)

    def _loss(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        with autocast(self.network.images.device, self.precision):
            logits = forward()
        return logits, cross_entropy(logits.float(), self.network.labels)

    def _logits_and_gradients(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        logits, loss = self._loss(forward)
        gradients = torch.autograd.grad(loss, trainable_of(self.network.model))
        return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def _step(self, forward: Callable[[], Tensor]) -> TrainingStep:
        trainable = trainable_of(self.network.model)
        device = self.network.images.device
        return training_step(lambda: self._loss(forward)[1], trainable, device, moments=self._moments)


def trainable_of(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that train."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
