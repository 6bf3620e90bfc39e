"""`variants.py`: right variants are proved, wrong ones are refused, each by what is wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

# The benchmarks are scripts, which find each other through the folder that they stand in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import networks
import variants

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy machine would make small networks slow
    yield
    torch.set_num_threads(threads)


def _network(name: str) -> networks.Network:
    return networks.build_network(name, batch_size=2, image_size=32, device=CPU)


def _variant(network: networks.Network, kind: str) -> variants.Variant:
    return next(variant for variant in variants.variants_of(network) if variant.kind == kind)


@pytest.mark.parametrize("kind", ["unfrozen", "partial", "frozen", "limit"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_right_variants_are_proved(name: str, kind: str) -> None:
    network = _network(name)
    variants.prove_equal(_variant(network, kind), network)


def _other_logits(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * 1.05)


def _statistics_that_move(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def enter() -> None:
        variant.enter()
        # What a trainer's own train() does to a backbone that was frozen by requires_grad alone.
        for module in network.model.modules():
            module.training = True

    def logits() -> Tensor:
        # The features come from before the statistics move, so that the buffers alone tell.
        network.model.backbone.eval()
        answer = variant.logits()
        nn.Module.train(network.model.backbone, True)
        with torch.no_grad():
            network.model.backbone(network.images)
        return answer

    return replace(variant, enter=enter, logits=logits)


def _another_gradient(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        answer = variant.logits()
        if answer.requires_grad:
            answer.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
        return answer

    return replace(variant, logits=logits)


def _nothing_frozen(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        network.model.backbone.get_parameter("conv1.0.weight").requires_grad_(True)
        return variant.logits()

    return replace(variant, logits=logits)


def _no_graph(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits().detach())


def _not_a_number(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_other_logits, "logits: off by"),
        (_not_a_number, "logits: off by nan"),
        (_statistics_that_move, r"\d+ buffers of frozen layers moved: backbone.conv1.1.running_mean"),
        (_another_gradient, r"gradient of classifier.\w+: off by"),
        (_no_graph, "nothing trains: the logits have no graph"),
        (_nothing_frozen, "a gradient where none belongs, .*: backbone.conv1.0.weight"),
    ],
)
def test_a_wrong_variant_is_refused(
    spoil: Callable[[networks.Network, variants.Variant], variants.Variant], complaint: str
) -> None:
    network = _network("test_resnet")
    right = _variant(network, "frozen")
    with pytest.raises(variants.WrongVariantError, match=complaint):
        variants.prove_equal(spoil(network, right), network)
    variants.prove_equal(right, network)
