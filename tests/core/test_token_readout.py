"""A readout of a timm transformer has the values of timm, and a model on it freezes, groups and trains as others do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm_families import FAMILIES
from torch import nn

from backbone_finetune import FineTuneModel, TokenReadout
from backbone_finetune.checkpoint import load_tensors, read_checkpoint, save_checkpoint
from backbone_finetune.frontier import NoFrontier, find_frontier

SIDE = 32
WITH_CLASS_TOKEN = ("beit", "deit", "eva", "tnt", "vision_transformer", "vision_transformer_hybrid")


def make_network(name: str = "test_vit", **keywords: Any) -> Any:
    network = timm.create_model(name, img_size=SIDE, **keywords).eval()
    randomize(network)
    return network


def randomize(network: nn.Module) -> None:
    """Replace the initial values: with them the norms do nothing, and the class token is zero."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)


def make_model(**keywords: Any) -> FineTuneModel:
    readout = TokenReadout(make_network(), **keywords)
    return FineTuneModel(readout, nn.Linear(readout.num_features, 3))


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE)


def pooled(network: Any, pool: str, inputs: torch.Tensor) -> torch.Tensor:
    """Return timm's own features with another pooling."""
    twin = copy.deepcopy(network)
    twin.reset_classifier(0, global_pool=pool)
    features: torch.Tensor = twin(inputs)
    return features


@torch.no_grad()
def test_it_concatenates_normed_class_tokens_from_input_to_output_and_the_mean_patch() -> None:
    network, inputs = make_network(), images()
    blocks = network.forward_intermediates(inputs, [3, 4, 5], return_prefix_tokens=True, norm=True, output_fmt="NLC")[1]
    expected = [prefix[:, 0] for _, prefix in blocks] + [blocks[-1][0].mean(1)]
    torch.testing.assert_close(TokenReadout(network, blocks=3, patch_mean=True)(inputs), torch.cat(expected, 1))


@pytest.mark.parametrize("norm_after_pooling", [False, True])
@torch.no_grad()
def test_the_last_class_token_and_the_mean_are_timms(norm_after_pooling: bool) -> None:
    network, inputs = make_network(fc_norm=norm_after_pooling, reg_tokens=2), images()
    expected = torch.cat([pooled(network, pool, inputs) for pool in ("token", "avg")], 1)
    torch.testing.assert_close(TokenReadout(network, patch_mean=True)(inputs), expected)


@pytest.mark.zoo
@pytest.mark.parametrize("family", WITH_CLASS_TOKEN)
@torch.no_grad()
def test_every_family_with_class_tokens_of_each_block_has_timms_values(family: str) -> None:
    network: Any = FAMILIES[family].build().eval()
    randomize(network)
    inputs = FAMILIES[family].images()
    expected = torch.cat([pooled(network, pool, inputs) for pool in ("token", "avg")], 1)
    found = TokenReadout(network, blocks=2, patch_mean=True)(inputs)[:, network.embed_dim :]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.zoo
@pytest.mark.parametrize("family", ["cait", "convit", "pit", "volo", "xcit"])
def test_a_family_whose_class_token_is_not_in_each_block_is_refused(family: str) -> None:
    with torch.device("meta"):
        network: Any = FAMILIES[family].build()
    assert network.cls_token is not None
    with pytest.raises(ValueError, match="has no class token that timm's forward_intermediates returns"):
        TokenReadout(network)


def test_a_model_has_the_transformers_groups_and_protocol() -> None:
    model, plain = make_model(blocks=4), FineTuneModel.from_timm(make_network(), num_classes=3)
    names = [group.name for group in model.layer_groups]
    assert names == [f"network.{group.name}" for group in plain.layer_groups]
    assert model.num_features == 4 * 64
    assert model.num_classes == 3
    assert model.pretrained_cfg == plain.pretrained_cfg
    assert model.no_weight_decay() == {
        name.replace("backbone.", "backbone.network.") for name in plain.no_weight_decay()
    }
    model.set_grad_checkpointing()
    assert model.backbone.network.grad_checkpointing  # type: ignore[union-attr]


def test_frozen_blocks_keep_their_bits_while_the_last_one_trains() -> None:
    model = make_model(blocks=2, patch_mean=True).freeze_backbone(trainable_groups=1).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1, weight_decay=0.1))
    with model.assert_frozen():
        model(images()).square().sum().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".blocks.")[1][0] for name in moved if ".blocks." in name} == {"5"}
    assert {"classifier.weight", "backbone.network.norm.weight"} <= moved


def test_the_frontier_of_a_partly_frozen_model_is_cached() -> None:
    model = make_model(blocks=2).freeze_backbone(trainable_groups=1).train()
    inputs = images(3)
    found = find_frontier(model, inputs)
    assert not isinstance(found, NoFrontier), found
    torch.testing.assert_close(found.replay(found.record(inputs)), model(inputs))


def test_a_checkpoint_of_it_loads(tmp_path: Any) -> None:
    model, other = make_model(blocks=2), make_model(blocks=2)
    save_checkpoint(model, tmp_path / "model.safetensors", {})
    load_tensors(other, read_checkpoint(tmp_path / "model.safetensors")[0])
    inputs = images()
    assert torch.equal(model.eval()(inputs), other.eval()(inputs))


def test_weights_that_it_does_not_use_are_removed() -> None:
    with torch.device("meta"):
        readout = TokenReadout(make_network("vit_pe_core_tiny_patch16_384"))
    assert not [name for name, _ in readout.named_parameters() if "pool" in name or "head" in name]


def test_of_two_prefix_tokens_the_first_is_the_class_token() -> None:
    network, inputs = make_network("deit_tiny_distilled_patch16_224"), images()
    with torch.no_grad():
        tokens = network.forward_features(inputs)
        expected = torch.cat([tokens[:, 0], tokens[:, 2:].mean(1)], 1)
        torch.testing.assert_close(TokenReadout(network, patch_mean=True)(inputs), expected)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit_relpos"])
def test_a_network_without_class_tokens_is_refused(name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    with pytest.raises(ValueError, match=r"has no class token that timm's .*; wrap it with FineTuneModel.from_timm"):
        TokenReadout(network)


@pytest.mark.parametrize("blocks", [0, 7])
def test_a_number_of_blocks_that_it_does_not_have_is_refused(blocks: int) -> None:
    with pytest.raises(ValueError, match=f"blocks={blocks}: VisionTransformer has 6; pass 1 to 6"):
        TokenReadout(make_network(), blocks=blocks)
