"""The variants that a benchmark compares: one network in different states, each proved right before it is timed."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from measure import TrainingStep
from memory import count_saved_bytes
from networks import Network
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from backbone_finetune import FineTuneModel

Kind = Literal["unfrozen", "partial", "frozen", "limit"]
Precision = Literal["off", "bf16", "fp16"]

_AUTOCAST_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Largest difference from the reference, relative to the largest reference value. It tells a wrong network (statistics
# of the batch in place of the running ones differ by tenths) from kernels that add up in another order; TF32, which
# cuDNN uses for float32 convolutions, keeps 10 bits of mantissa, bf16 7.
_TOLERANCE = {"off": 2e-3, "bf16": 6e-2, "fp16": 1e-2}


class WrongVariantError(Exception):
    """A variant computes something else than the network does: its times would be those of other work."""


@dataclass(frozen=True)
class Variant:
    """One state of a network: `enter` puts the network into it, `logits` then runs its forward."""

    kind: Kind
    trainable_groups: int | None
    enter: Callable[[], object]
    logits: Callable[[], Tensor]

    @property
    def label(self) -> str:
        return self.kind if self.kind != "partial" else f"{self.trainable_groups} trainable groups"


def variants_of(network: Network, *, compiled: bool = False) -> list[Variant]:
    """List the states from unfrozen, by one more frozen layer group at a time, to frozen; and last the limit.

    The limit is what no way of freezing can beat: the backbone in eval mode under `no_grad`, and the bare classifier on
    its features, which depend on nothing but themselves.
    """
    model, images = network.model, network.images
    run: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
    extract: Callable[[Tensor], Tensor] = torch.compile(model.backbone) if compiled else model.backbone

    def enter(trainable_groups: int) -> Callable[[], object]:
        if trainable_groups == network.depth:
            return lambda: model.unfreeze_backbone().train()
        return lambda: model.freeze_backbone(trainable_groups=trainable_groups).train()

    def enter_limit() -> None:
        model.freeze_backbone().train()
        model.backbone.eval()

    def limit_logits() -> Tensor:
        with torch.no_grad():
            features = own_storage(extract(images))
        return model.classifier(features)  # type: ignore[no-any-return]

    def forward() -> Tensor:
        return run(images)

    variants = [Variant("unfrozen", network.depth, enter(network.depth), forward)]
    variants += [Variant("partial", count, enter(count), forward) for count in range(network.depth - 1, 0, -1)]
    variants.append(Variant("frozen", 0, enter(0), forward))
    variants.append(Variant("limit", None, enter_limit, limit_logits))
    return variants


def own_storage(features: Tensor) -> Tensor:
    """Copy features that are a small view of a large tensor, so that what is kept for backward is theirs alone."""
    return features.clone() if features.untyped_storage().nbytes() > features.nbytes else features


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Autocast to the precision asked for; `off` is a context that changes nothing."""
    return torch.autocast(device.type, dtype=_AUTOCAST_TYPES[precision], enabled=precision != "off")


class Trainer:
    """Makes the training steps of one network's variants, on one set of optimizer moments.

    Each variant has an optimizer over what it trains, as a user has. The moments are shared, as the parameters are: a
    copy for each would fill the memory of a GPU.
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
        """Make the step of a variant, which it enters to see what trains in it."""
        variant.enter()
        return training_step(
            lambda: self.loss(variant),
            [parameter for parameter in self._network.model.parameters() if parameter.requires_grad],
            self._network.images.device,
            enter=variant.enter,
            scaled=self._precision == "fp16",
            moments=self._moments,
        )


def training_step(
    loss: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    device: torch.device,
    *,
    enter: Callable[[], object] = lambda: None,
    scaled: bool = False,
    moments: defaultdict[Tensor, Any] | None = None,
) -> TrainingStep:
    """Make a step with AdamW, and with loss scaling where `scaled`.

    The learning rate is 0, so that all repetitions do the same arithmetic on the same weights.
    """
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    if moments is not None:
        optimizer.state = moments
    # A scaler that is switched off hands losses and steps through unchanged.
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


def prove_equal(variant: Variant, network: Network, precision: Precision = "off") -> None:
    """Raise WrongVariantError unless a variant does the network's own work and leaves alone what it froze.

    Compared with a copy that has no freezing in it at all: the logits, the gradients of the classifier and of what else
    trains, no gradient elsewhere, and bit-equal buffers in each layer without a trainable parameter.
    """
    model = network.model
    variant.enter()
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reference = copy.deepcopy(model)
    buffers = {name: buffer.clone() for name, buffer in _buffers_of_frozen_layers(model)}
    with _logits_and_gradients(model, variant.logits, network, precision) as (logits, gradients):
        expected_logits, expected_gradients = _reference(reference, variant.kind, network, precision)
        _compare("logits", logits, expected_logits, precision)
        for name in dict(model.classifier.named_parameters(prefix="classifier")):
            _compare(f"gradient of {name}", gradients.get(name), expected_gradients.get(name), precision)
        expected_gradients = {name: gradient for name, gradient in expected_gradients.items() if name in training}
        if gradients.keys() != expected_gradients.keys():
            wrong = sorted(gradients.keys() ^ expected_gradients.keys())
            raise WrongVariantError(f"a gradient where none belongs, or none where one does: {', '.join(wrong[:3])}")
        # As one vector: a single layer's gradient may be nothing but rounding, as a bias's before a BatchNorm.
        together, expected = (
            torch.cat([tree[name].flatten() for name in sorted(tree)]) for tree in (gradients, expected_gradients)
        )
        _compare("gradients", together, expected, precision)
    moved = [name for name, buffer in _buffers_of_frozen_layers(model) if not torch.equal(buffer, buffers[name])]
    if moved:
        raise WrongVariantError(f"{len(moved)} buffers of frozen layers moved: {', '.join(moved[:3])}, ...")


def _buffers_of_frozen_layers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that sit beside frozen parameters: read off `requires_grad`, as modes are what is on trial."""
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False))


def _reference(
    model: FineTuneModel, kind: Kind, network: Network, precision: Precision
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a plain network: everything trains, the two parts are called one after the other."""
    if kind in ("frozen", "limit"):
        model.backbone.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for path, module in model.named_modules():
        module.training = modes[path]

    def logits() -> Tensor:
        return model.classifier(model.backbone(network.images))  # type: ignore[no-any-return]

    with _logits_and_gradients(model, logits, network, precision) as (output, gradients):
        return output, gradients


@contextmanager
def _logits_and_gradients(
    model: nn.Module, forward: Callable[[], Tensor], network: Network, precision: Precision
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # dropout must draw the same numbers on both sides
    with autocast(network.images.device, precision):
        logits = forward()
    if not logits.requires_grad:
        raise WrongVariantError("nothing trains: the logits have no graph to go back through")
    functional.cross_entropy(logits.float(), network.labels).backward()  # type: ignore[no-untyped-call]
    yield logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)


def _compare(what: str, value: Tensor | None, expected: Tensor | None, precision: Precision) -> None:
    if value is None or expected is None:
        if value is expected:
            return
        raise WrongVariantError(f"{what}: {'missing' if value is None else 'there, though the network has none'}")
    difference = (value.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if not difference <= _TOLERANCE[precision] * scale:  # so that NaN is a difference
        raise WrongVariantError(
            f"{what}: off by {difference:.3g} where the largest value is {scale:.3g}; "
            f"{_TOLERANCE[precision]:g} of that is allowed"
        )


def count_saved(variant: Variant, network: Network) -> int:
    """Count the bytes that a variant's forward and loss keep for backward, in float32."""
    variant.enter()
    return count_saved_bytes(lambda: Trainer(network).loss(variant), network.model.parameters())


def count_backward_flops(loss: Callable[[], Tensor]) -> int:
    """Count the floating point operations of a backward alone, as torch's FlopCounterMode knows them."""
    graph = loss()
    with FlopCounterMode(display=False) as counter:
        graph.backward()  # type: ignore[no-untyped-call]
    total: int = counter.get_total_flops()
    return total
