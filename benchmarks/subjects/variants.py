"""The variants that a benchmark compares: one network in different freeze states, and their training steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from harness.memory import count_saved_bytes
from harness.timing import TrainingStep
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from subjects.networks import Network

Kind = Literal["unfrozen", "partial", "frozen", "limit"]
Precision = Literal["off", "bf16", "fp16"]

_AUTOCAST_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One state of a network: `enter` puts the network into it, and `logits` runs its forward.

    A compiled forward draws other random numbers than a plain one. `proof_logits` is then the same forward, compiled
    to draw the same ones, which is slower: it is compared, not timed.
    """

    kind: Kind
    trainable_groups: int | None
    enter: Callable[[], object]
    logits: Callable[[], Tensor]
    proof_logits: Callable[[], Tensor] | None = None

    @property
    def label(self) -> str:
        return self.kind if self.kind != "partial" else f"{self.trainable_groups} trainable groups"


def variants_of(network: Network, *, compiled: bool = False) -> list[Variant]:
    """List the states from unfrozen to frozen, with one more frozen layer group each, and last the limit.

    No way of freezing can be faster than the limit: the backbone in eval mode under `no_grad`, and the bare classifier
    on its features.
    """
    model = network.model

    def enter(trainable_groups: int) -> Callable[[], object]:
        if trainable_groups == network.depth:
            return lambda: model.unfreeze_backbone().train()
        return lambda: model.freeze_backbone(trainable_groups=trainable_groups).train()

    def enter_limit() -> None:
        model.freeze_backbone().train()
        model.backbone.eval()

    forwards = _forwards(network, torch.compile if compiled else lambda module: module)
    proof_whole, proof_limit = None, None
    if compiled:
        # inductor's option for drawing random numbers by torch's own kernels, in torch's own order.
        proofs = _forwards(network, partial(torch.compile, options={"fallback_random": True}))
        proof_whole, proof_limit = proofs.whole, proofs.limit
    whole = (forwards.whole, proof_whole)
    variants = [Variant("unfrozen", network.depth, enter(network.depth), *whole)]
    variants += [Variant("partial", count, enter(count), *whole) for count in range(network.depth - 1, 0, -1)]
    variants.append(Variant("frozen", 0, enter(0), *whole))
    variants.append(Variant("limit", None, enter_limit, forwards.limit, proof_limit))
    return variants


@dataclass(frozen=True)
class _Forwards:
    whole: Callable[[], Tensor]
    limit: Callable[[], Tensor]


def _forwards(network: Network, prepare: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> _Forwards:
    """Return the network's forward and the limit's, whose two parts are prepared like the whole."""
    model, images = network.model, network.images
    run, extract, classify = prepare(model), prepare(model.backbone), prepare(model.classifier)

    def limit() -> Tensor:
        with torch.no_grad():
            features = own_storage(extract(images))
        return classify(features)

    return _Forwards(lambda: run(images), limit)


def own_storage(features: Tensor) -> Tensor:
    """Copy features that are a small view of a large tensor, so that only they are kept for backward."""
    return features.clone() if features.untyped_storage().nbytes() > features.nbytes else features


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return an autocast context for a precision; `off` has no effect."""
    return torch.autocast(device.type, dtype=_AUTOCAST_TYPES[precision], enabled=precision != "off")


class Trainer:
    """Makes the training steps of one network's variants, on one set of optimizer moments.

    Each variant has an optimizer of its trainable parameters, like a user. The moments are shared, like the parameters:
    a copy for each would fill the memory of a GPU.
    """

    def __init__(self, network: Network, precision: Precision = "off") -> None:
        self._network = network
        self._precision: Precision = precision
        self._moments: defaultdict[Tensor, Any] = defaultdict(dict)

    def loss(self, variant: Variant) -> Tensor:
        """Forward and loss, () in float32."""
        with autocast(self._network.images.device, self._precision):
            logits = variant.logits()
        return functional.cross_entropy(logits.float(), self._network.labels)

    def step_of(self, variant: Variant) -> TrainingStep:
        """Return the step of a variant, after entering it to find its trainable parameters."""
        variant.enter()
        return training_step(
            lambda: self.loss(variant),
            [parameter for parameter in self._network.model.parameters() if parameter.requires_grad],
            self._network.images.device,
            enter=variant.enter,
            scaled=self._precision == "fp16",
            moments=self._moments,
        )


def fused_on(device: torch.device) -> bool | None:
    """Return `fused` for the optimizers compared here: True on CUDA, as the library trains, else torch's default."""
    return True if device.type == "cuda" else None


def optimizer_name(device: torch.device) -> str:
    """Name the optimizer that `training_step` makes."""
    return "fused AdamW" if fused_on(device) else "AdamW"


def training_step(
    loss: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    device: torch.device,
    *,
    enter: Callable[[], object] = lambda: None,
    scaled: bool = False,
    moments: defaultdict[Tensor, Any] | None = None,
) -> TrainingStep:
    """Make a step with AdamW, fused on CUDA, and with loss scaling where `scaled`.

    The learning rate is 0, so that all repetitions compute the same.
    """
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=fused_on(device))
    if moments is not None:
        optimizer.state = moments
    # A disabled scaler passes losses and steps through.
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()

    return TrainingStep(
        enter=enter,
        forward=lambda: scaler.scale(loss()),
        update=update,
        clear_gradients=lambda: optimizer.zero_grad(set_to_none=True),
    )


def count_saved(variant: Variant, network: Network) -> int:
    """Count the bytes that a variant's forward and loss keep for backward, in float32."""
    variant.enter()
    return count_saved_bytes(lambda: Trainer(network).loss(variant), network.model.parameters())


def count_backward_flops(loss: Callable[[], Tensor]) -> int:
    """Count the floating-point operations of a backward with torch's FlopCounterMode."""
    graph = loss()
    with FlopCounterMode(display=False) as counter:
        graph.backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total
