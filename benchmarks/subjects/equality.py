"""Check that a variant computes the same as the network, before it is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from harness import cuda
from torch import Tensor, nn
from torch.nn import functional

from backbone_finetune import FineTuneModel
from subjects.networks import Network
from subjects.variants import Kind, Precision, Variant, autocast

# Largest difference from the reference, relative to the largest reference value. It tells a wrong network (statistics
# of the batch in place of the running ones differ by tenths) from kernels that add up in another order; TF32, which
# cuDNN uses for float32 convolutions, keeps 10 bits of mantissa, bf16 7.
_TOLERANCE = {"off": 2e-3, "bf16": 6e-2, "fp16": 1e-2}


class WrongVariantError(Exception):
    """A variant computes something else than the network, so its times are meaningless."""


def prove_equal(variant: Variant, network: Network, precision: Precision = "off") -> None:
    """Raise WrongVariantError unless a variant computes the same as the network and changes no frozen buffer.

    Compared with a copy without any freezing: the logits, the gradients of the classifier and of everything else that
    trains, no gradient elsewhere, and bit-equal buffers in each layer without a trainable parameter.
    """
    model = network.model
    variant.enter()
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_classifier = list(dict(model.classifier.named_parameters(prefix="classifier")))
    buffers = {name: buffer.clone() for name, buffer in _buffers_of_frozen_layers(model)}
    # The copy is deleted before the variant runs, and only the requested gradients are kept: the check needs
    # no more memory than training, which keeps two moments for each weight.
    expected = _reference(copy.deepcopy(model), variant.kind, network, precision, keep={*training, *in_classifier})
    logits_of = variant.proof_logits if expected.draws and variant.proof_logits is not None else variant.logits
    with _logits_and_gradients(model, logits_of, network, precision) as (logits, gradients):
        compare("logits", logits, expected.logits, precision)
        for name in in_classifier:
            compare(f"gradient of {name}", gradients.get(name), expected.gradients.get(name), precision)
        expected_gradients = {name: gradient for name, gradient in expected.gradients.items() if name in training}
        if gradients.keys() != expected_gradients.keys():
            wrong = sorted(gradients.keys() ^ expected_gradients.keys())
            raise WrongVariantError(f"a gradient where none belongs, or none where one does: {', '.join(wrong[:3])}")
        # As one vector: a single layer's gradient may be rounding only, e.g. of a bias before a BatchNorm.
        together, together_expected = (
            torch.cat([tree[name].flatten() for name in sorted(tree)]) for tree in (gradients, expected_gradients)
        )
        compare("gradients", together, together_expected, precision)
    moved = [name for name, buffer in _buffers_of_frozen_layers(model) if not torch.equal(buffer, buffers[name])]
    if moved:
        raise WrongVariantError(f"{len(moved)} buffers of frozen layers moved: {', '.join(moved[:3])}, ...")


def _buffers_of_frozen_layers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of layers with frozen parameters, by `requires_grad`, because modes are what is checked."""
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False))


@dataclass(frozen=True)
class _Expected:
    """The results of a plain network; `draws` is whether its forward drew random numbers, e.g. for dropout."""

    logits: Tensor
    gradients: dict[str, Tensor]
    draws: bool


def _reference(
    model: FineTuneModel, kind: Kind, network: Network, precision: Precision, *, keep: Container[str]
) -> _Expected:
    """Run a plain network: everything trains, the two parts are called one after the other."""
    if kind in ("frozen", "limit"):
        model.backbone.eval()
    modes = {path: module.training for path, module in model.named_modules()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for path, module in model.named_modules():
        module.training = modes[path]
    draws = False

    def logits() -> Tensor:
        nonlocal draws
        before = _random_state(network.images.device)
        answer: Tensor = model.classifier(model.backbone(network.images))
        draws = not torch.equal(before, _random_state(network.images.device))
        return answer

    with _logits_and_gradients(model, logits, network, precision) as (output, gradients):
        return _Expected(output, {name: gradients[name] for name in gradients if name in keep}, draws)


def _random_state(device: torch.device) -> Tensor:
    return cuda.random_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _logits_and_gradients(
    model: nn.Module, forward: Callable[[], Tensor], network: Network, precision: Precision
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # the same dropout masks on both sides
    with autocast(network.images.device, precision):
        logits = forward()
    if not logits.requires_grad:
        raise WrongVariantError("nothing trains: the logits have no graph to go back through")
    functional.cross_entropy(logits.float(), network.labels).backward()  # type: ignore[no-untyped-call]
    yield logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)


def compare(what: str, value: Tensor | None, expected: Tensor | None, precision: Precision = "off") -> None:
    """Raise WrongVariantError if a value differs from the expected one by more than the precision explains."""
    if value is None or expected is None:
        if value is expected:
            return
        raise WrongVariantError(f"{what}: {'missing' if value is None else 'there, though the network has none'}")
    difference = (value.float() - expected.float()).abs().max().item()
    scale = expected.float().abs().max().item()
    if not difference <= _TOLERANCE[precision] * scale:  # NaN counts as a difference
        raise WrongVariantError(
            f"{what}: off by {difference:.3g} where the largest value is {scale:.3g}; "
            f"{_TOLERANCE[precision]:g} of that is allowed"
        )
