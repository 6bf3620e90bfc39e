"""A timm network's own head is kept with its dropout or raises; num_classes and num_features."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """A head without an attribute for its classes: (B, 96) -> (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 5))

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.weight


class Several(Head):
    """Two outputs: (B, 96) -> (B, 5), (B, 5)."""

    def forward(self, features: Tensor) -> Any:
        return features @ self.weight, features @ self.weight


class HiddenDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(96, 5)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(nn.functional.dropout(features, 0.5, self.training))


HEADS = {
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(96, 5)),
    "norm without parameters": lambda: nn.Sequential(nn.BatchNorm1d(96, affine=False), nn.Linear(96, 5)),
    "clamp": lambda: nn.Sequential(nn.Linear(96, 5), nn.Hardtanh(-100, 100)),
    "hidden dropout": HiddenDropout,
    "no linear layer": Head,
}


def assert_trains_alike(model: FineTuneModel, plain: nn.Module) -> None:
    for mode in (True, False):
        outputs = []
        for either in (model.train(mode), plain.train(mode)):
            torch.manual_seed(3)
            outputs.append(either(IMAGES))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("kind", HEADS)
def test_a_custom_head_is_kept_completely(kind: str) -> None:
    network: Any = timm.create_model("test_resnet")
    network.fc = HEADS[kind]()
    plain = copy.deepcopy(network)
    keys = list(network.state_dict())
    model = FineTuneModel.from_timm(network)
    assert type(model.classifier) is type(plain.fc)
    assert_trains_alike(model, plain)
    assert (model.num_classes, model.num_features) == (5, 96)
    again: Any = model.to_module()
    assert list(again.state_dict()) == keys
    assert again.num_classes == 5
    assert_trains_alike(model, again)
    model.classifier = nn.Linear(96, 2)
    assert model.to_module()(IMAGES).shape == (4, 2)


def test_a_head_without_parameters_is_kept() -> None:
    network: Any = timm.create_model("test_resnet", num_classes=0)
    network.fc = nn.BatchNorm1d(96, affine=False)
    plain = copy.deepcopy(network)
    model = FineTuneModel.from_timm(network)
    assert isinstance(model.classifier, nn.BatchNorm1d)
    assert_trains_alike(model, plain)


@pytest.mark.parametrize("together", [tuple, list, lambda outputs: dict(zip("ab", outputs, strict=True))])
def test_a_head_of_several_tasks_is_kept(together: Any) -> None:
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(96, 5), nn.Linear(96, 3)])

        def forward(self, features: Tensor) -> Any:
            return together([part(nn.functional.dropout(features, 0.5, self.training)) for part in self.parts])

    network: Any = timm.create_model("test_resnet")
    network.fc = Tasks()
    plain = copy.deepcopy(network).eval()
    model = FineTuneModel.from_timm(network).eval()
    expected = plain(IMAGES)
    for outputs in (model(IMAGES), model.to_module().eval()(IMAGES)):
        assert type(outputs) is type(expected)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert model.num_classes is None


def test_a_head_whose_output_cannot_be_compared_raises() -> None:
    class Says(nn.Linear):
        def forward(self, features: Tensor) -> Any:
            return str(super().forward(features).shape)

    network: Any = timm.create_model("test_resnet")
    network.fc = Says(96, 5)
    with pytest.raises(ValueError, match=r"a str and a str cannot be compared\); pass num_classes"):
        FineTuneModel.from_timm(network)


@pytest.mark.parametrize("num_classes", [None, 7])
def test_dropout_inside_timms_own_head_is_kept(num_classes: int | None) -> None:
    overlay = {"input_size": (3, 64, 64)}
    network: Any = timm.create_model("cpubone_nano", num_classes=3, drop_rate=0.5, pretrained_cfg_overlay=overlay)
    model = FineTuneModel.from_timm(network, num_classes=num_classes)
    assert [part.p for part in model.classifier.modules() if isinstance(part, nn.Dropout)] == [0.5]
    again: Any = model.to_module().eval()
    assert again.head.classifier.dropout.p == 0.5
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))
    without = timm.create_model("cpubone_nano", num_classes=3, pretrained_cfg_overlay=overlay)
    assert isinstance(FineTuneModel.from_timm(without, num_classes=7).classifier, nn.Linear)


def test_dropout_that_reset_classifier_would_lose_raises() -> None:
    class DropsItsLogits(timm.models.ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.3, self.training and self.num_classes > 0)

    network = DropsItsLogits(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with pytest.raises(ValueError, match="not the same function any more in train mode"):
        FineTuneModel.from_timm(network)


def test_a_head_that_reset_classifier_cannot_remove_raises_with_a_remedy() -> None:
    network: Any = timm.create_model("convnext_atto")
    network.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"reset_classifier of ConvNeXt fails .*from_module\(net, net\.head\)"):
        FineTuneModel.from_timm(network)


@pytest.mark.parametrize("kind", ["num_classes", "own", "module"])
def test_drop_rate_changes_no_state_dict_key(kind: str) -> None:
    def build(**keywords: Any) -> FineTuneModel:
        if kind == "num_classes":
            return FineTuneModel.from_timm("test_resnet", num_classes=3, **keywords)
        if kind == "own":
            return FineTuneModel.from_timm("test_resnet", **keywords)
        head = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))
        return FineTuneModel.from_timm("test_resnet", classifier=head, **keywords)

    dropping, zero, without = build(drop_rate=0.5), build(drop_rate=0.0), build()
    for model in (zero, without):
        model.load_state_dict(dropping.state_dict())
    if kind != "module":
        assert dropping.get_classifier().weight is dropping.classifier.weight
    features = torch.ones(2, 96)
    for model, drops in ((dropping, True), (zero, False), (without, False)):
        model.train()
        assert torch.equal(model.classifier(features), model.classifier(features)) is not drops
    assert torch.equal(dropping.eval().classifier(features), without.eval().classifier(features))


def test_drop_rate_is_in_copies_and_not_in_the_reassembled_network() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3, drop_rate=0.5).freeze_backbone()
    features = torch.ones(2, 96)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(twin.train().classifier(features), twin.classifier(features))
    plain: Any = model.to_module()
    assert plain.fc.weight is model.classifier.weight
    assert torch.equal(plain.fc.train()(features), plain.fc(features))
    assert not torch.equal(model.train().classifier(features), model.classifier(features))
    compiled = torch.compile(model.classifier, backend="eager")
    assert not torch.equal(compiled(features), compiled(features))
    model.classifier.requires_grad_(False)
    model.train()
    assert torch.equal(model.classifier(features), model.classifier(features))


def test_num_classes_creates_a_new_classifier_with_a_checkpoint(tmp_path: Path) -> None:
    network: Any = timm.create_model("test_resnet", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    keywords = {"checkpoint_path": str(tmp_path / "weights.pth"), "num_classes": 7}
    model = FineTuneModel.from_timm("test_resnet", **keywords)
    assert torch.equal(model.backbone.conv1[0].weight, network.conv1[0].weight)
    assert not torch.equal(model.classifier.weight, network.fc.weight)
    with pytest.raises(
        ValueError, match=r"with num_classes=3 .*size mismatch for fc.*from_timm\(network, num_classes=3\)"
    ):
        FineTuneModel.from_timm("test_resnet", **{**keywords, "num_classes": 3})
    own: Any = timm.create_model("test_resnet", num_classes=7, checkpoint_path=keywords["checkpoint_path"])
    assert FineTuneModel.from_timm(own, num_classes=3).num_classes == 3  # as the message says


def test_a_1x1_convolution_is_another_parameter_on_the_same_memory() -> None:
    model = FineTuneModel.from_timm("dla46x_c", num_classes=3)
    plain: Any = model.to_module()
    optimizer = torch.optim.SGD(model.param_groups(lr=1.0))
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    before = plain.fc.weight.detach().clone()
    optimizer.step()
    assert torch.equal(plain.fc.weight, before - 1)


def test_num_classes_and_num_features_follow_the_present_parts() -> None:
    model = FineTuneModel.from_timm("test_resnet")
    assert (model.num_classes, model.num_features) == (1000, 96)
    model.classifier = Head()
    assert (model.num_classes, model.num_features) == (5, 96)
    plain: Any = model.to_module()
    assert plain.num_classes == plain.eval()(IMAGES).shape[1] == 5
    model.classifier = nn.Sequential(nn.Linear(96, 4), nn.LogSoftmax(dim=1))
    assert model.num_classes == 4
    model.classifier = Several()
    assert model.num_classes is None
    assert model.to_module().num_classes is None
    model.classifier = nn.ReLU()
    assert model.num_classes is None
    backbone: Any = timm.create_model("test_resnet", num_classes=0)
    backbone.fc = nn.Linear(96, 16)
    assert FineTuneModel(backbone, nn.Sequential(nn.ReLU(), nn.Linear(16, 3))).num_features == 16
    custom = FineTuneModel(nn.Flatten(), nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)))
    assert (custom.num_classes, custom.num_features) == (3, 4)
    unknown = FineTuneModel(nn.Flatten(), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    assert (unknown.num_classes, unknown.num_features) == (3, None)
    assert FineTuneModel.from_timm("levit_128s").num_classes == 1000
