"""PEFT: LoRA around the model and inside its backbone train the same; adapter folders and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_loops import BATCH_SIZE, EPOCHS, recipe, small_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def vit() -> FineTuneModel:
    return small_model("test_vit", img_size=32).eval()


def adapt(model: FineTuneModel) -> dict[str, Any]:
    """The recipe, with adapters of the same random weights on both sides."""
    other = vit()
    names = recipe("PEFT", model=model, backbone=other.backbone, classifier=other.classifier)
    around, inside = (
        {name.replace("base_model.model.", ""): weight for name, weight in each.named_parameters() if "lora_A" in name}
        for each in (names["adapted"], names["inside"])
    )
    with torch.no_grad():
        for name, weight in around.items():
            inside[name].copy_(weight)
    return names


def train(network: nn.Module, images: TensorDataset, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(EPOCHS):
        network.train()
        for inputs, targets in DataLoader(images, BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
    network.eval()


def test_adapters_around_and_inside_train_the_same_parameters(images: TensorDataset) -> None:
    model = vit()
    names = adapt(model)
    adapted, inside = names["adapted"], names["inside"]
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 6 + 2  # two matrices in each of six blocks, and the classifier
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    with model.assert_frozen():
        train(adapted, images, names["optimizer"])
    with inside.assert_frozen():
        train(inside, images, torch.optim.AdamW(inside.param_groups(lr=1e-3)))
    inputs = images.tensors[0]
    assert torch.equal(adapted(inputs), inside(inputs))
    assert not torch.equal(adapted(inputs), vit()(inputs))


def test_adapters_inside_are_reloaded(images: TensorDataset, tmp_path: Path) -> None:
    inside, inputs = adapt(vit())["inside"], images.tensors[0]
    with inside.assert_frozen():
        train(inside, images, torch.optim.AdamW(inside.param_groups(lr=1e-3)))
    again = adapt(vit())["inside"].eval()
    again.load_state_dict(inside.state_dict(), strict=True)
    assert torch.equal(again(inputs), inside(inputs))

    inside.backbone.save_pretrained(tmp_path)
    backbone = peft.PeftModel.from_pretrained(vit().backbone, tmp_path)
    again = FineTuneModel(backbone, vit().classifier).eval()
    again.classifier.load_state_dict(inside.classifier.state_dict())
    assert torch.equal(again(inputs), inside(inputs))
    assert not torch.equal(vit()(inputs), inside(inputs))


class LowRank(nn.Module):
    """LoRA without PEFT, as a parametrization of a weight."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(each.detach().clone()) for each in (a, b))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a  # PEFT's scale is alpha / r = 8 / 8


def test_adapters_equal_a_plain_loop_on_a_plain_network(images: TensorDataset) -> None:
    model, plain = vit(), vit().to_module().requires_grad_(requires_grad=False)
    names = adapt(model)
    plain.head.requires_grad_()
    for block, ours in zip(plain.blocks, model.backbone.blocks, strict=True):
        low_rank = LowRank(ours.attn.qkv.lora_A.default.weight, ours.attn.qkv.lora_B.default.weight)
        parametrize.register_parametrization(block.attn.qkv, "weight", low_rank)
    decays = {group["weight_decay"] for group in names["optimizer"].param_groups}
    weights = [weight for weight in plain.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": max(decays)},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    with model.assert_frozen():
        train(names["adapted"], images, names["optimizer"])
    train(plain, images, torch.optim.AdamW(groups, lr=1e-3))
    inputs = images.tensors[0]
    torch.testing.assert_close(names["adapted"](inputs), plain(inputs), rtol=0, atol=1e-3)
    assert (plain(inputs) - vit()(inputs)).abs().max() > 0.1


def test_an_adapter_folder_and_the_merged_model(images: TensorDataset, tmp_path: Path) -> None:
    model = vit()
    names = adapt(model)
    adapted, inputs = names["adapted"], images.tensors[0]
    train(adapted, images, names["optimizer"])
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    assert torch.equal(again(inputs), adapted(inputs))

    expected = adapted(inputs)
    merged = adapted.merge_and_unload()
    assert merged is model
    assert [group.name for group in merged.regroup().layer_groups] == [group.name for group in vit().layer_groups]
    torch.testing.assert_close(merged(inputs), expected)
    torch.testing.assert_close(merged.to_module()(inputs), expected)
