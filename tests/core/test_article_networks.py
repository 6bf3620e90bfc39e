"""The article's three networks: the same parameters train as in its recipe, and frozen statistics do not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import timm
import torch
from article_networks import ConvModel, PretrainedResNet, PretrainedResNetVariation, freeze_by_name
from torch import nn

from backbone_finetune import FineTuneModel

CASES: list[Any] = [
    pytest.param(ConvModel, 0, ("fc",), id="ConvModel"),
    pytest.param(PretrainedResNet, 0, ("fc",), id="PretrainedResNet"),
    pytest.param(PretrainedResNetVariation, 1, ("fc", "layer4"), id="PretrainedResNetVariation"),
]
Build = Callable[[], nn.Module]


def wrap(network: Any, trainable_groups: int) -> FineTuneModel:
    return FineTuneModel.from_module(network, network.fc).freeze_backbone(trainable_groups=trainable_groups)


def train(network: nn.Module, steps: int = 3) -> None:
    """Train with Adam, lr 0.001, on the trainable parameters and the same images in every call."""
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.001)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(4, 3, 64, 64, generator=generator)
        targets = torch.randint(10, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()


@pytest.mark.parametrize(("build", "trainable_groups", "words"), CASES)
def test_same_parameters_train(build: Build, trainable_groups: int, words: Collection[str]) -> None:
    network = build()
    recipe = copy.deepcopy(network)
    freeze_by_name(recipe, words)
    plain = wrap(network, trainable_groups).to_module()
    ours = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    assert ours == {name: parameter.requires_grad for name, parameter in recipe.named_parameters()}


@pytest.mark.parametrize(("build", "trainable_groups", "words"), CASES)
def test_prints_the_same_list(
    build: Build, trainable_groups: int, words: Collection[str], capsys: pytest.CaptureFixture[str]
) -> None:
    network = build()
    model = wrap(copy.deepcopy(network), trainable_groups)
    model.print_trainable_parameters(by_name=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed == freeze_by_name(network, words)
    assert "Trainable parameter: fc.weight" in printed
    assert "Frozen parameter: conv1.weight" in printed


@pytest.mark.parametrize(("build", "trainable_groups", "words"), CASES)
def test_training_equals_the_recipe_in_the_same_modes(
    build: Build, trainable_groups: int, words: Collection[str]
) -> None:
    network = build()
    recipe = copy.deepcopy(network)
    start = copy.deepcopy(network.state_dict())
    freeze_by_name(recipe, words)
    for name, child in recipe.named_children():
        child.train(name in words)

    model = wrap(network, trainable_groups).train()
    with model.assert_frozen():
        train(model)
    train(recipe)

    ours, theirs = model.to_module().state_dict(), recipe.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours[name], start[name]) != name.startswith(tuple(words)), name


def test_conv_model_training_equals_the_unmodified_recipe() -> None:
    network = ConvModel()
    recipe = copy.deepcopy(network)
    freeze_by_name(recipe, ("fc",))
    model = wrap(network, 0).train()
    train(model)
    train(recipe.train())
    for name, tensor in recipe.state_dict().items():
        assert torch.equal(model.to_module().state_dict()[name], tensor), name


@pytest.mark.parametrize(("build", "trainable_groups", "words"), CASES[1:])
def test_statistics_are_constant_where_the_recipe_updates_them(
    build: Build, trainable_groups: int, words: Collection[str]
) -> None:
    network = build()
    recipe = copy.deepcopy(network)
    freeze_by_name(recipe, words)
    start = {name: buffer.clone() for name, buffer in network.named_buffers() if not name.startswith("layer4")}

    model = wrap(network, trainable_groups).train()
    train(model)
    train(recipe.train())

    ours, theirs = dict(model.backbone.named_buffers()), dict(recipe.named_buffers())
    assert all(torch.equal(ours[name], start[name]) for name in start)
    assert not any(torch.equal(theirs[name], start[name]) for name in start)
    layer4_moved = ours["layer4.1.num_batches_tracked"].item() > 0
    assert layer4_moved == (trainable_groups == 1)


@pytest.mark.parametrize(("build", "trainable_groups", "words"), CASES)
def test_no_activations_of_the_frozen_part_are_saved_for_backward(
    build: Build, trainable_groups: int, words: Collection[str]
) -> None:
    model = wrap(build(), trainable_groups).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    with_gradient = {name.partition(".")[0] for name, p in model.to_module().named_parameters() if p.grad is not None}
    assert with_gradient == set(words)


def test_the_recipe_trains_the_wrong_layers_of_a_squeeze_and_excitation_network() -> None:
    network = timm.create_model("regnety_002", num_classes=10)
    recipe = copy.deepcopy(network)
    freeze_by_name(recipe, ("fc",))
    its_trainable = [name for name, parameter in recipe.named_parameters() if parameter.requires_grad]
    assert any(".se.fc1." in name for name in its_trainable)

    model = FineTuneModel.from_timm(network, num_classes=10).freeze_backbone()
    plain = model.to_module().named_parameters()
    assert [name for name, p in plain if p.requires_grad] == ["head.fc.weight", "head.fc.bias"]


def test_the_recipe_freezes_the_classifier_of_a_vision_transformer() -> None:
    network = timm.create_model("test_vit", num_classes=10)
    recipe = copy.deepcopy(network)
    freeze_by_name(recipe, ("fc",))
    assert not recipe.head.weight.requires_grad
    assert recipe.blocks[0].mlp.fc1.weight.requires_grad

    model = FineTuneModel.from_timm(network, num_classes=10).freeze_backbone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
