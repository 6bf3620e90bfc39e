"""Optimizer groups: each trainable parameter once, with its learning rate and weight decay."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import nn

from backbone_finetune import FineTuneModel


def by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}


def test_parts_are_separate_groups_and_biases_do_not_decay() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    groups = model.param_groups(lr=0.1, backbone_lr=0.01, weight_decay=0.05)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("backbone", 0.01, 0.05),
        ("backbone.no_decay", 0.01, 0.0),
        ("classifier", 0.1, 0.05),
        ("classifier.no_decay", 0.1, 0.0),
    ]
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert (parameter.ndim <= 1 or name.endswith(".bias")) == (group["weight_decay"] == 0.0)
    assert sorted(by_name(groups)) == sorted(parameters)


def test_without_weight_decay_there_are_no_separate_groups() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(trainable_groups=1)
    groups = model.param_groups(lr=0.1)
    assert [(group["name"], group["lr"]) for group in groups] == [("backbone", 0.1), ("classifier", 0.1)]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trainable


def test_a_matrix_named_bias_does_not_decay() -> None:
    backbone = nn.Module()
    backbone.bias = nn.Parameter(torch.zeros(2, 2))
    backbone.qkv_bias_table = nn.Parameter(torch.zeros(2, 2))
    rates = by_name(FineTuneModel(backbone, nn.Linear(2, 2)).param_groups(lr=1.0, weight_decay=0.1))
    assert rates["backbone.bias"] == (1.0, 0.0)
    assert rates["backbone.qkv_bias_table"] == (1.0, 0.1)


def test_names_in_no_weight_decay_do_not_decay() -> None:
    model = FineTuneModel.from_timm("test_vit", num_classes=3)
    rates = by_name(model.param_groups(lr=1.0, weight_decay=0.1))
    assert model.backbone.pos_embed.ndim == 3
    assert rates["backbone.pos_embed"] == (1.0, 0.0)
    assert rates["backbone.patch_embed.proj.weight"] == (1.0, 0.1)


SMALL_SWIN = {"img_size": 32, "embed_dim": 24, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}}


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("test_resnet", {}), ("test_vit", {}), ("swin_tiny_patch4_window7_224", SMALL_SWIN)],
)
@pytest.mark.parametrize("trainable_groups", [1, None])
def test_layer_decay_equals_timms_on_the_whole_network(
    name: str, keywords: dict[str, Any], trainable_groups: int | None
) -> None:
    network = timm.create_model(name, num_classes=3, **keywords)
    scales = {
        parameter: group["lr_scale"]
        for group in timm.optim.param_groups_layer_decay(network, layer_decay=0.7)
        for parameter in group["params"]
    }
    expected = {parameter_name: scales[p] for parameter_name, p in network.named_parameters()}
    model = FineTuneModel.from_timm(network)
    if trainable_groups is not None:
        model.freeze_backbone(trainable_groups=trainable_groups)
    rates = by_name(model.param_groups(lr=0.2, backbone_lr=0.1, weight_decay=0.05, layer_decay=0.7))
    assert rates
    for parameter_name, (rate, _) in rates.items():
        plain = model._reassembly.original_name(parameter_name)
        base = 0.2 if parameter_name.startswith("classifier.") else 0.1
        assert rate == pytest.approx(base * expected[plain]), parameter_name


def test_layer_decay_of_a_custom_network_is_by_layer_group() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    groups = FineTuneModel.from_module(net, net[3]).param_groups(lr=1.0, layer_decay=0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("backbone.0", 0.25),
        ("backbone.1", 0.5),
        ("classifier", 1.0),
    ]


def test_timms_optimizer_factory_has_the_same_scales() -> None:
    network = timm.create_model("test_vit", num_classes=3)
    keywords: dict[str, Any] = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75}

    def rates(module: nn.Module) -> dict[int, tuple[float, float]]:
        optimizer = timm.optim.create_optimizer_v2(module, **keywords)
        return {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}

    plain = rates(network)
    assert rates(FineTuneModel.from_timm(network)) == plain


def test_a_child_of_the_backbone_may_be_named_classifier() -> None:
    backbone = nn.Sequential()
    backbone.features = nn.Linear(4, 4)
    backbone.classifier = nn.Linear(4, 4)  # as in torchvision's vgg
    model = FineTuneModel(backbone, nn.Linear(4, 2))
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=1.0, weight_decay=0.0, layer_decay=0.1)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    layers = (model.classifier, backbone.classifier, backbone.features)
    assert [scales[id(layer.weight)] for layer in layers] == pytest.approx([1.0, 0.1, 0.01])


def test_a_tied_parameter_has_its_depth_by_each_of_its_names() -> None:
    backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    backbone[1].weight = backbone[0].weight
    depth_of = FineTuneModel(backbone, nn.Linear(2, 2)).group_matcher()
    assert depth_of("backbone.1.weight") == depth_of("backbone.0.weight") == 0


def test_a_name_that_is_not_in_the_model_raises() -> None:
    depth_of = FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).group_matcher()
    for name in ("_orig_mod.backbone.weight", "weight", "backbone.2.weight"):
        with pytest.raises(
            ValueError, match=rf"group_matcher: '{name}' is not a parameter of this FineTuneModel, .* before"
        ):
            depth_of(name)


def test_a_timm_network_in_an_adapter_keeps_its_depths_and_exemptions() -> None:
    network = timm.create_model("test_vit", num_classes=0)
    plain = FineTuneModel(network, nn.Linear(64, 3))
    inside = FineTuneModel(nn.Sequential(network, nn.Flatten()), nn.Linear(64, 3))
    keywords: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.1, "layer_decay": 0.5}
    expected = {
        name.replace("backbone.", "backbone.0."): v for name, v in by_name(plain.param_groups(**keywords)).items()
    }
    assert by_name(inside.param_groups(**keywords)) == expected


def test_depths_include_the_modules_around_a_timm_network() -> None:
    network = timm.create_model("test_resnet", num_classes=0)
    depth = FineTuneModel(network, nn.Linear(96, 3)).group_matcher()("classifier.weight")
    around = nn.Sequential(nn.Conv2d(1, 3, 1), network, nn.Linear(96, 64))
    depth_of = FineTuneModel(around, nn.Linear(64, 3)).group_matcher()
    assert depth_of("backbone.0.weight") == 0
    assert depth_of("backbone.1.conv1.0.weight") == 1
    assert depth_of("backbone.2.weight") == depth + 1
    assert depth_of("classifier.weight") == depth + 2


def test_groups_are_the_same_whatever_is_frozen() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    keywords: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05, "layer_decay": 0.75, "include_frozen": True}
    whole = by_name(model.param_groups(**keywords))
    for count in (0, 2):
        model.freeze_backbone(trainable_groups=count)
        assert by_name(model.param_groups(**keywords)) == whole


def test_optimizers_accept_the_groups() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone()
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1), momentum=0.9)
    assert optimizer.param_groups[0]["param_names"] == ["classifier.weight", "classifier.bias"]
    state = optimizer.state_dict()
    torch.optim.SGD(model.param_groups(lr=0.5), momentum=0.9).load_state_dict(state)


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_rates_given_as_tensors_equal_those_given_as_numbers(layer_decay: float | None, shape: tuple[int, ...]) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    keywords: dict[str, Any] = {"weight_decay": 0.05, "layer_decay": layer_decay}
    expected = model.param_groups(lr=0.5, backbone_lr=0.25, **keywords)
    lr, backbone_lr = torch.full(shape, 0.5), torch.full(shape, 0.25)
    groups = model.param_groups(lr=lr, backbone_lr=backbone_lr, **keywords)
    assert [group["lr"].item() for group in groups] == [group["lr"] for group in expected]
    assert [group["param_names"] for group in groups] == [group["param_names"] for group in expected]
    for group in groups:
        group["lr"].zero_()  # like a scheduler
        assert [other["lr"].item() == 0 for other in groups].count(True) == 1
        group["lr"].fill_(1.0)
    assert (lr.item(), backbone_lr.item()) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \(2,\); pass one finite number, 0 or more, as a float or"),
        ({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1\.\); pass a finite number, 0 or more"),
        ({"lr": 0.1, "backbone_lr": torch.empty(0)}, r"backbone_lr is a tensor of shape \(0,\)"),
        ({"lr": -0.1}, r"lr=-0\.1; pass a finite number, 0 or more"),
        ({"lr": 0.1, "backbone_lr": -1.0}, r"backbone_lr=-1\.0"),
        ({"lr": 0.1, "weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"lr": 0.1, "layer_decay": float("nan")}, "layer_decay=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"lr": None}, "lr=None; pass a finite number"),
        ({"lr": "0.1"}, "lr='0.1'; pass a finite number"),
        ({"lr": 0.1, "weight_decay": None}, "weight_decay=None"),
    ],
)
def test_invalid_rates_raise(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).param_groups(**keywords)


def test_no_trainable_parameter_raises() -> None:
    model = FineTuneModel(nn.Linear(2, 2), nn.Linear(2, 2)).freeze_backbone()
    model.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter trains; unfreeze"):
        model.param_groups(lr=0.1)
