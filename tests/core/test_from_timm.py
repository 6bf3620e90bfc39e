"""from_timm: the models that it builds, its errors, and that an error changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm_families import FAMILIES
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def snapshot(network: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    flags = [(name, parameter.requires_grad, id(parameter)) for name, parameter in network.named_parameters()]
    modules = [(name, id(module), module.training) for name, module in network.named_modules()]
    return tensors, flags, modules


def assert_untouched(network: nn.Module, before: tuple[Any, ...]) -> None:
    tensors, flags, modules = snapshot(network)
    assert (flags, modules) == before[1:]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)


def test_a_name_builds_the_same_network_as_timm() -> None:
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=7)
    torch.manual_seed(3)
    ours = FineTuneModel.from_timm("test_resnet", num_classes=7)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.to_module().state_dict()[name], tensor), name
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


def test_a_network_is_modified_in_place_by_reset_classifier() -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    layer4 = network.layer4
    model = FineTuneModel.from_timm(network, num_classes=3)
    assert model.backbone is network
    assert model.backbone.layer4 is layer4
    assert isinstance(network.fc, nn.Identity)
    assert model(IMAGES).shape == (2, 3)


def test_a_kept_classifier_has_the_same_logits_and_gradients() -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    plain = copy.deepcopy(network)
    model = FineTuneModel.from_timm(network)
    for mode in (True, False):
        model.zero_grad()
        plain.zero_grad()
        ours, theirs = model.train(mode)(IMAGES), plain.train(mode)(IMAGES)
        assert torch.equal(ours, theirs)
        ours.square().sum().backward()
        theirs.square().sum().backward()
        gradients = {name: p.grad for name, p in model.to_module().named_parameters()}
        for name, parameter in plain.named_parameters():
            assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("name", ["dpn48b", "resnetv2_18"])
def test_a_1x1_convolution_becomes_a_linear_layer_and_is_restored(name: str) -> None:
    network = timm.create_model(name, num_classes=7).eval()
    plain = copy.deepcopy(network)
    model = FineTuneModel.from_timm(network).eval()
    assert isinstance(model.classifier, nn.Linear)
    torch.testing.assert_close(model(IMAGES), plain(IMAGES))
    with torch.no_grad():
        model.classifier.weight.add_(1)
    again = model.to_module()
    torch.testing.assert_close(again(IMAGES), model(IMAGES))
    assert again.state_dict().keys() == plain.state_dict().keys()


def test_a_custom_classifier() -> None:
    head = nn.Sequential(nn.LayerNorm(384), nn.Linear(384, 2))
    widths: list[int] = []

    def build(width: int) -> nn.Module:
        widths.append(width)
        return head

    assert FineTuneModel.from_timm("resnet18", classifier=lambda width: nn.Linear(width, 2)).num_features == 512
    network = timm.create_model("vit_small_patch16_224", img_size=32)
    model = FineTuneModel.from_timm(network, classifier=build)
    assert widths == [384]
    assert model.classifier is head
    assert model.num_classes == 2
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), model.to_module()(images))


def test_num_classes_creates_a_new_classifier_even_if_the_count_is_the_pretrained_one(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = FineTuneModel.from_timm(
        "test_resnet",
        num_classes=1000,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")},
    )
    assert torch.equal(model.backbone.layer4[0].conv1.weight, network.layer4[0].conv1.weight)
    assert not torch.equal(model.classifier.weight, network.fc.weight)


def test_pretrained_without_num_classes_keeps_its_classifier(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = FineTuneModel.from_timm("test_resnet", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(IMAGES), network(IMAGES))


def varies(function: Any) -> bool:
    return not torch.equal(function(IMAGES), function(IMAGES))


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "convnext_atto", "mobilenetv3_small_050"])
def test_drop_rate_is_active_on_a_frozen_backbone_in_train_mode_only(name: str) -> None:
    size = {"img_size": 64} if name == "test_vit" else {}
    model = FineTuneModel.from_timm(name, num_classes=50, drop_rate=0.5, **size).freeze_backbone().train()
    assert varies(model)
    model.unfreeze_backbone()
    for module in model.backbone.modules():  # keeps the comparison exact
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not varies(model.backbone)
    model.eval()
    assert not varies(model)
    plain = model.to_module().eval()
    assert torch.equal(plain(IMAGES), model(IMAGES))
    assert plain.state_dict().keys() == timm.create_model(name, num_classes=50, **size).state_dict().keys()


def test_dropout_does_not_change_printed_names(capsys: pytest.CaptureFixture[str]) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3, drop_rate=0.5).freeze_backbone()
    model.print_trainable_parameters(by_name=True)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Trainable parameter: fc.weight",
        "Trainable parameter: fc.bias",
    ]


def test_construction_keeps_the_random_state() -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    before = torch.get_rng_state()
    FineTuneModel.from_timm(network)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (("resnet19",), {"num_classes": 3}, r"resnet19: .* has no such architecture; the nearest names are .*resnet1"),
        (("resnet18.a9",), {"num_classes": 3}, r"resnet18 has no weights tagged 'a9'; its tags are .*a1_in1k"),
        (("resnet18", 3), {"classifier": nn.Linear(512, 3)}, "num_classes and classifier were both given"),
        (("",), {"num_classes": 3}, r"from_timm: model=''; pass the name of an architecture"),
        (("resnet18", 3), {"drop_rate": 1.5}, r"drop_rate=1\.5; pass a number from 0 to 1"),
        (("resnet18", 3), {"drop_rate": -0.1}, r"drop_rate=-0\.1; pass a number from 0 to 1"),
        (("resnet18", 3), {"drop_rate": "0.1"}, r"drop_rate='0\.1'; pass a number from 0 to 1"),
        (("resnet18", 3), {"drop_rate": True}, "drop_rate=True; pass a number from 0 to 1"),
        (("resnet18", 0), {}, "num_classes=0; pass an integer from 1"),
        (("resnet18", 3), {"features_only": True}, "features_only=True returns feature maps"),
        (("resnet18", 3), {"global_pool": ""}, "global_pool='' leaves the features unpooled"),
        (("resnet18",), {"classifier": nn.Linear(100, 3)}, r"\(Linear\) cannot take .* \(B, 512\)"),
        (("gemma4_vit_167m_enc", 3), {}, r"has no classifier to take off .*FineTuneModel\(backbone, classifier\)"),
    ],
)
def test_invalid_arguments_raise(arguments: tuple[Any, ...], keywords: dict[str, Any], message: str) -> None:
    context = torch.device("meta") if "gemma" in arguments[0] else torch.device("cpu")
    with context, pytest.raises(ValueError, match=message):
        FineTuneModel.from_timm(*arguments, **keywords)


@pytest.mark.parametrize(
    ("build", "keywords", "message"),
    [
        ("resnet18", {"num_classes": 3, "pretrained": True}, "pretrained and a network were both given"),
        ("resnet18", {"num_classes": 3, "drop_rate": 0.1}, "drop_rate and a network were both given"),
        ("resnet18", {"num_classes": 3, "img_size": 64}, "img_size and a network were both given"),
        ("resnet18", {"classifier": nn.Linear(100, 3)}, "cannot take the backbone's features"),
        ("crossvit_tiny_240", {}, "is not one that takes one feature vector; pass num_classes"),
    ],
)
def test_a_network_is_unchanged_after_an_error(build: str, keywords: dict[str, Any], message: str) -> None:
    network = timm.create_model(build)
    before = snapshot(network)
    with pytest.raises(ValueError, match=message):
        FineTuneModel.from_timm(network, **keywords)
    assert_untouched(network, before)


def test_unpooled_and_foreign_networks_raise() -> None:
    with pytest.raises(ValueError, match=r"returns \(2, 512, 7, 7\), not \(B, width\)"):
        FineTuneModel.from_timm(timm.create_model("resnet18", num_classes=0, global_pool=""), num_classes=3)
    with pytest.raises(ValueError, match="a features_only model, or not a timm network"):
        FineTuneModel.from_timm(timm.create_model("resnet18", features_only=True), num_classes=3)
    with pytest.raises(ValueError, match=r"use FineTuneModel\.from_module"):
        FineTuneModel.from_timm(nn.Sequential(nn.Linear(4, 4)), num_classes=3)


def test_numpy_integers_are_accepted() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=np.int64(3)).freeze_backbone(
        trainable_groups=np.int64(1)
    )
    assert model.num_classes == 3
    assert model.backbone.layer4.training
    for wrong in (True, 2.0, "2"):
        with pytest.raises(ValueError, match=f"num_classes={wrong!r}; pass an integer from 1"):
            FineTuneModel.from_timm("test_resnet", num_classes=wrong)


def test_a_network_in_eval_mode_stays_in_eval_mode() -> None:
    model = FineTuneModel.from_timm(timm.create_model("test_resnet").eval()).freeze_backbone(trainable_groups=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(IMAGES)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.train().backbone.layer4.training


def test_a_new_classifier_has_the_networks_dtype() -> None:
    network = timm.create_model("levit_128s").to(torch.bfloat16)  # whose head is more than one layer
    assert {p.dtype for p in FineTuneModel.from_timm(network, num_classes=3).parameters()} == {torch.bfloat16}


def test_wrong_types_raise() -> None:
    with pytest.raises(TypeError, match="from_timm: model=None; pass the name of an architecture"):
        FineTuneModel.from_timm(None, num_classes=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="classifier=5; pass a module, or a function"):
        FineTuneModel.from_timm("resnet18", classifier=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"classifier\(512\) returned a int"):
        FineTuneModel.from_timm("resnet18", classifier=lambda width: width)  # type: ignore[arg-type,return-value]


def test_a_network_that_processes_its_logits_raises() -> None:
    class Scaled(timm.models.resnet.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log_softmax(dim=1)

    network = Scaled(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with pytest.raises(ValueError, match="not the same function any more"):
        FineTuneModel.from_timm(network)


def test_a_network_that_scales_its_logits_raises() -> None:
    class Softened(timm.models.resnet.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x / 2 if self.num_classes else x

    network = Softened(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with pytest.raises(ValueError, match="not the same function any more"):
        FineTuneModel.from_timm(network)


def test_to_module_keeps_the_random_state() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    before = torch.get_rng_state()
    model.to_module()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["levit", "repvit", "crossvit", "efficientvim", "volo"])
def test_to_module_raises_for_a_classifier_that_the_network_cannot_contain(name: str) -> None:
    network = FAMILIES[name].build()
    model = FineTuneModel.from_timm(network, num_classes=3)
    before = snapshot(network)
    message = rf"to_module: {type(network).__name__} has more in its classifier than one linear layer .*; keep the Fine"
    with pytest.raises(ValueError, match=message):
        model.to_module()
    assert_untouched(network, before)
