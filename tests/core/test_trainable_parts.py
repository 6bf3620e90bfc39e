"""Which parts of a backbone train: any submodules or the last groups, but not parameters that its author fixed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from backbone_finetune import FineTuneModel, LayerGroup


def model_of_three() -> FineTuneModel:
    backbone = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)))
    return FineTuneModel(backbone, nn.Linear(4, 2))


def training(model: FineTuneModel) -> list[str]:
    return [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]


def test_the_first_block_alone_trains_and_the_rest_stays_frozen() -> None:
    model = model_of_three()
    first = model.backbone[0]
    assert model.freeze_backbone(trainable=[first]) is model
    assert training(model) == [f"0.{name}" for name, _ in first.named_parameters()]
    model.train()
    assert first.training
    assert not model.backbone[1].training
    assert not model.backbone[2].training
    groups = model.param_groups(lr=0.1)
    assert [name for group in groups for name in group["param_names"]] == [
        *(f"backbone.0.{name}" for name, _ in first.named_parameters()),
        "classifier.weight",
        "classifier.bias",
    ]
    optimizer = torch.optim.SGD(groups)
    before = copy.deepcopy(first.state_dict())
    with model.assert_frozen():
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    moved = [name for name, value in first.state_dict().items() if not torch.equal(before[name], value)]
    assert set(moved) >= {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_parts_are_given_as_modules_or_groups_and_replace_earlier_calls() -> None:
    model = model_of_three()
    norms = [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm1d)]
    assert training(model.freeze_backbone(trainable=norms)) == [
        f"{i}.1.{n}" for i in range(3) for n in ("weight", "bias")
    ]
    bias = LayerGroup("biases", ("0.0.bias", "2.0.bias"))
    assert training(model.freeze_backbone(trainable=(bias, norms[1]))) == [
        "0.0.bias",
        "1.1.weight",
        "1.1.bias",
        "2.0.bias",
    ]
    assert training(model.freeze_backbone(trainable=model.layer_groups[:1])) == list(
        model.layer_groups[0].parameter_names
    )


def test_a_tied_parameter_trains_by_any_of_its_names() -> None:
    model = model_of_three()
    model.backbone[2][0].weight = model.backbone[0][0].weight
    model = FineTuneModel(model.backbone, model.classifier)
    model.freeze_backbone(trainable=[model.backbone[2][0]])
    assert training(model) == ["0.0.weight", "2.0.bias"]


@pytest.mark.parametrize(
    ("choose", "kind", "message"),
    [
        (
            lambda m: [nn.Linear(4, 4)],
            ValueError,
            r"trainable: Linear is not a submodule of the backbone \(S",
        ),
        (lambda m: [m.classifier], ValueError, r"trainable: Linear is not a submodule .* pass its submodule objects"),
        (lambda m: [m.backbone[0][2]], ValueError, r"trainable: '0\.2' has no parameters, so it cannot train"),
        (
            lambda m: [LayerGroup("a", ("third",))],
            ValueError,
            "'third' in group 'a' is not a parameter of the backbone",
        ),
        (lambda m: [LayerGroup("a", ())], ValueError, "trainable: 'a' has no parameters"),
        (lambda m: ["0"], TypeError, "trainable: '0' is neither a module nor a LayerGroup; pass submodule objects"),
        (lambda m: m.backbone[0], TypeError, r"trainable: a Sequential; pass a list of .*, e\.g\. trainable=\["),
        (lambda m: [], ValueError, r"trainable=\[\]: the list is empty; .* call freeze_backbone\(\)"),
    ],
)
def test_an_invalid_part_raises_and_nothing_changes(choose: Any, kind: type[Exception], message: str) -> None:
    model = model_of_three().freeze_backbone(trainable_groups=1)
    before = training(model)
    with pytest.raises(kind, match=message):
        model.freeze_backbone(trainable=choose(model))
    assert training(model) == before


def test_both_arguments_raise() -> None:
    model = model_of_three()
    with pytest.raises(ValueError, match=r"trainable_groups=1 and trainable=\[\.\.\.\] are both given; pass one"):
        model.freeze_backbone(trainable_groups=1, trainable=[model.backbone[0]])


def test_trainable_groups_is_read_from_requires_grad() -> None:
    model = model_of_three()
    for count in (0, 1, 2, 3):
        assert model.freeze_backbone(trainable_groups=count).trainable_groups == count
    assert model.freeze_backbone(trainable=[model.backbone[0]]).trainable_groups is None
    assert model.freeze_backbone(trainable=[model.backbone[2]]).trainable_groups == 1
    model.backbone[1].requires_grad_(True)  # set by hand
    assert model.trainable_groups == 2
    model.backbone[1][0].bias.requires_grad_(False)
    assert model.trainable_groups is None
    assert FineTuneModel(nn.Flatten(), nn.Linear(4, 2)).trainable_groups == 0


class WithTable(nn.Module):
    """Like a small transformer, with a fixed position table."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 3, 8), requires_grad=False)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))


def test_parameters_that_the_author_fixed_stay_frozen() -> None:
    model = FineTuneModel(WithTable(), nn.Linear(8, 2))
    model.freeze_backbone().unfreeze_backbone()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["backbone.positions"]
    assert model.trainable_groups == len(model.layer_groups)
    model.freeze_backbone(trainable=[model.backbone])
    assert not model.backbone.positions.requires_grad


@pytest.mark.parametrize("part", ["", "blocks", "blocks.3"])
def test_groups_that_were_frozen_before_wrapping_are_unfrozen(part: str) -> None:
    backbone = WithTable()
    backbone.positions.requires_grad_(True)
    backbone.get_submodule(part).requires_grad_(False)
    model = FineTuneModel(backbone, nn.Linear(8, 2)).unfreeze_backbone()
    assert all(parameter.requires_grad for parameter in model.parameters())
    network = timm.create_model("test_resnet")
    network.layer1.requires_grad_(False)
    assert all(
        p.requires_grad for p in FineTuneModel.from_timm(network, num_classes=3).unfreeze_backbone().parameters()
    )


def test_unfreezing_warns_if_many_parameters_are_fixed() -> None:
    backbone = WithTable()
    for block in backbone.blocks:
        block.weight.requires_grad_(False)
    model = FineTuneModel(backbone, nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"unfreeze_backbone: 13 parameters \(8.*%.*\) stay frozen"):
        model.unfreeze_backbone()
    assert not backbone.blocks[0].weight.requires_grad
    assert backbone.blocks[0].bias.requires_grad


def test_regroup_includes_parameters_that_were_added_after_wrapping() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    model = FineTuneModel.from_timm(network, norm_eval=True)
    names = [group.name for group in model.layer_groups]
    nn.utils.parametrizations.weight_norm(model.backbone.layer4[0].conv1)
    adapter = model.backbone.layer4[0].adapter = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"has lost 1 parameter \(.*\) and gained 4 parameters .* call model\.regroup\(\)"
    ):
        model.freeze_backbone()
    model.backbone.requires_grad_(False)
    adapter.requires_grad_(True)
    assert model.regroup() is model
    assert [group.name for group in model.layer_groups] == names
    assert training(model) == ["layer4.0.adapter.weight", "layer4.0.adapter.bias"]
    assert model.norm_eval
    assert type(model.to_module()) is type(network)
    assert training(model.freeze_backbone(trainable=[adapter])) == ["layer4.0.adapter.weight", "layer4.0.adapter.bias"]
    whole = [LayerGroup("all", tuple(name for name, _ in model.backbone.named_parameters()))]
    assert model.regroup(layer_groups=whole).layer_groups == tuple(whole)


def test_adapters_of_a_wrapped_network_train_alone() -> None:
    backbone = WithTable().requires_grad_(False)
    for block in list(backbone.blocks)[6:]:  # as in PEFT: all base weights fixed, adapters in some places
        block.adapter = nn.Linear(8, 8)
    model = FineTuneModel(backbone, nn.Linear(8, 2))
    adapters = [name for name, _ in backbone.named_parameters() if "adapter" in name]
    assert training(model) == adapters
    assert training(model.freeze_backbone(trainable_groups=1)) == adapters[-2:]
    assert model.trainable_groups == 1
    with pytest.warns(UserWarning, match="stay frozen, because they were frozen next to trainable ones"):
        model.unfreeze_backbone()
    assert training(model) == adapters
    assert model.trainable_groups == len(model.layer_groups)
    assert (training(model.freeze_backbone()), model.trainable_groups) == ([], 0)


def test_lazy_layers_freeze_before_their_first_forward(capsys: pytest.CaptureFixture[str]) -> None:
    backbone = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8))
    model = FineTuneModel(backbone, nn.LazyLinear(2)).freeze_backbone(trainable_groups=1)
    assert training(model) == ["2.weight", "2.bias"]
    model.print_trainable_parameters()
    assert "trainable parameters: 72 of 72" in capsys.readouterr().out
    model(torch.zeros(2, 5)).sum().backward()
    assert training(model) == ["2.weight", "2.bias"]
    assert backbone[0].weight.shape == (8, 5)
    assert backbone[0].weight.grad is None
    assert training(model.unfreeze_backbone()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_unfreezing_only_fixed_parameters_warns() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    backbone[1].weight.requires_grad_(True)
    model = FineTuneModel(backbone, nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"^freeze_backbone: all 2 parameters to unfreeze \(0\.\w+, 0\.\w+\) stay"):
        model.freeze_backbone(trainable=[backbone[0]])
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    model.freeze_backbone(trainable_groups=1)  # some of it trains, like adapters on fixed weights
    assert [name for name, parameter in backbone.named_parameters() if parameter.requires_grad] == ["1.weight"]
