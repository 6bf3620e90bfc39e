"""PEFT: LoRA around the model and inside its backbone train the same; adapter folders and merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from client_loops import BATCH_SIZE, EPOCHS, recipe, small_model
from torch import nn
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
