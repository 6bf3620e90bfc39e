"""Layer groups: an ordered, complete partition of any backbone, found or given."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from backbone_finetune import FineTuneModel, LayerGroup


def names(backbone: nn.Module, **keywords: object) -> list[str]:
    return [group.name for group in FineTuneModel(backbone, nn.Identity(), **keywords).layer_groups]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("test_vit", ["stem", *(f"blocks.{i}" for i in range(6))]),
        ("convnext_atto", ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]),
        ("densenet121", ["stem", *(f"features.denseblock{i}" for i in range(1, 5))]),
        ("rdnet_tiny", ["stem", *(f"dense_stages.{i}" for i in range(7))]),
        ("poolformer_s12", ["stem", "stages.0", "stages.1", "stages.2", "stages.3"]),
        ("pit_ti_224", ["stem", "transformers.0", "transformers.1", "transformers.2"]),
    ],
)
def test_groups_have_recognizable_names(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        assert names(timm.create_model(name, num_classes=0)) == expected


def test_a_tied_parameter_of_a_timm_network_belongs_to_its_first_group() -> None:
    with torch.device("meta"):
        backbone = timm.create_model("coat_tiny", num_classes=0)
    tied = backbone.serial_blocks1[0].factoratt_crpe.crpe.conv_list[0].weight
    assert tied is backbone.crpe1.conv_list[0].weight
    stem, *later = FineTuneModel(backbone, nn.Identity()).layer_groups
    assert "crpe1.conv_list.0.weight" in stem.parameter_names
    assert not any("crpe.conv_list.0.weight" in name for group in later for name in group.parameter_names)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.activation = nn.ReLU()
        self.second = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.token = nn.Parameter(torch.zeros(2))


def test_a_custom_network_is_grouped_by_its_children() -> None:
    backbone = Custom()
    backbone.first = nn.Linear(2, 8)
    groups = FineTuneModel(backbone, nn.Linear(2, 2)).layer_groups
    assert groups == (
        LayerGroup("first", ("token", "first.weight", "first.bias")),
        LayerGroup("second", ("second.0.weight", "second.0.bias", "second.1.weight", "second.1.bias")),
    )


def test_a_child_with_most_parameters_is_split() -> None:
    assert FineTuneModel(Custom(), nn.Linear(2, 2)).layer_groups == (
        LayerGroup("first", ("token", "first.weight", "first.bias")),
        LayerGroup("second.0", ("second.0.weight", "second.0.bias")),
        LayerGroup("second.1", ("second.1.weight", "second.1.bias")),
    )


def test_a_tied_parameter_belongs_to_its_first_group() -> None:
    backbone = Custom()
    backbone.second[1].weight = backbone.first.weight
    model = FineTuneModel(backbone, nn.Linear(2, 2))
    assert "first.weight" in model.layer_groups[0].parameter_names
    assert "second.1.weight" not in model.layer_groups[1].parameter_names
    model.freeze_backbone(trainable_groups=1)
    assert not backbone.second[1].weight.requires_grad
    assert backbone.second[1].bias.requires_grad


class Transformer(nn.Module):
    """Like transformers' ViT: blocks in a ModuleList two levels down, then a norm and a pooler."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.embeddings = nn.Linear(4, 8)
        self.encoder = nn.Module()
        self.encoder.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.encoder.layer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 48), nn.Linear(48, 8)) for _ in range(depth)
        )
        self.layernorm = nn.LayerNorm(8)
        self.pooler = nn.Linear(8, 8)


def test_the_blocks_of_a_transformer_are_its_groups() -> None:
    model = FineTuneModel(Transformer(), nn.Linear(8, 2))
    first, *_, last = model.layer_groups
    assert [group.name for group in model.layer_groups[1:]] == [f"encoder.layer.{i}" for i in range(12)]
    assert first.parameter_names == ("token", "embeddings.weight", "embeddings.bias", "encoder.positions")
    assert {"layernorm.weight", "pooler.weight"} < set(last.parameter_names)
    depth_of = model.group_matcher()
    names_of_parameters = ("token", "encoder.positions", "encoder.layer.3.1.bias")
    assert [depth_of(f"backbone.{name}") for name in names_of_parameters] == [0, 0, 4]
    assert depth_of("classifier.weight") == 13


def stage(width: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width)) for _ in range(2)))


def test_stages_with_the_same_structure_are_not_split() -> None:
    backbone = nn.Sequential()
    backbone.features = nn.Sequential(nn.Linear(4, 8), stage(8), nn.Linear(8, 16), stage(16), nn.LayerNorm(16))
    assert names(backbone) == ["features.0", "features.1", "features.2", "features.3"]
    assert names(nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), stage(16), stage(24))) == [
        "0",
        "3",
        "4",
    ]


def test_a_norm_joins_the_layer_before_it_or_else_the_next() -> None:
    backbone = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    groups = FineTuneModel(backbone, nn.Linear(4, 2)).layer_groups
    assert [group.name for group in groups] == ["1", "4"]
    assert groups[0].parameter_names[0] == "0.weight"
    assert groups[0].parameter_names[-1] == "2.bias"


def test_a_small_last_layer_does_not_join_a_group_with_most_parameters() -> None:
    assert names(nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 1))) == ["0", "2"]


class Wrapper(nn.Module):
    """Forwards unknown attributes to the network inside, like PEFT's models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapper, lambda network: Wrapper(Wrapper(network))])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "poolformer_s12"])
def test_a_timm_network_inside_another_module_is_found(wrap: Callable[[nn.Module], nn.Module], name: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    inside, outside = FineTuneModel(network, nn.Identity()), FineTuneModel(wrap(network), nn.Identity())
    prefix = next(path for path, module in outside.backbone.named_modules() if module is network)
    assert [(group.name, group.parameter_names) for group in outside.layer_groups] == [
        (f"{prefix}.{group.name}", tuple(f"{prefix}.{parameter}" for parameter in group.parameter_names))
        for group in inside.layer_groups
    ]
    parameters = [parameter for parameter, _ in network.named_parameters()]
    depth_inside, depth_outside = inside.group_matcher(), outside.group_matcher()
    assert [depth_outside(f"backbone.{prefix}.{p}") for p in parameters] == [
        depth_inside(f"backbone.{p}") for p in parameters
    ]
    exempt = {parameter.replace("backbone", f"backbone.{prefix}") for parameter in inside.no_weight_decay()}
    assert outside.no_weight_decay() == exempt


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_vit", ["model.stem", *(f"model.blocks.{i}" for i in range(6))]),
        ("convnext_atto", ["stem_0", "stages_0", "stages_1", "stages_2", "stages_3"]),
        ("test_resnet", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_features_only_of_timm(name: str, expected: list[str]) -> None:
    with torch.device("meta"):
        assert names(timm.create_model(name, features_only=True)) == expected


def test_a_matcher_for_other_names_is_ignored() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(3)))

        def group_matcher(self, coarse: bool = False) -> dict[str, str]:
            return {"stem": "^stem", "blocks": r"^blocks\.(\d+)"}

    model = FineTuneModel(Renamed(), nn.Linear(4, 2))
    assert [group.name for group in model.layer_groups] == ["body.0", "body.1", "body.2"]
    assert model.group_matcher()("classifier.weight") == 3


def test_feature_info_with_unknown_stages_is_ignored() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    backbone.feature_info = [{"module": "stages.0"}, {"module": "1"}]
    assert names(backbone) == ["0", "1"]


@pytest.mark.parametrize("given", [False, True])
def test_the_work_is_linear_in_the_number_of_blocks(given: bool) -> None:
    def calls(count: int) -> int:
        backbone = nn.Sequential(*(nn.Linear(1, 1) for _ in range(count)))
        head, total = nn.Linear(1, 1), 0

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal total
            total += event in {"call", "c_call"}

        sys.setprofile(count_call)
        try:
            FineTuneModel(backbone, head, layer_groups=list(backbone) if given else None)
        finally:
            sys.setprofile(None)
        return total

    calls(2)
    assert calls(400) < 2.2 * calls(200)


def test_groups_are_given_as_modules_or_layer_groups() -> None:
    backbone = Custom()
    rest = LayerGroup("entrance", ("token", "first.weight", "first.bias"))
    model = FineTuneModel(backbone, nn.Linear(2, 2), layer_groups=[rest, backbone.second[0], backbone.second[1]])
    assert [group.name for group in model.layer_groups] == ["entrance", "second.0", "second.1"]
    model.freeze_backbone(trainable_groups=1)
    assert [n for n, p in backbone.named_parameters() if p.requires_grad] == ["second.1.weight", "second.1.bias"]


def test_from_timm_and_from_module_accept_groups() -> None:
    network = timm.create_model("test_resnet")
    halves = [
        LayerGroup("early", tuple(n for n, _ in network.named_parameters() if not n.startswith(("layer4", "fc")))),
        network.layer4,
    ]
    assert len(FineTuneModel.from_timm(network, num_classes=2, layer_groups=halves).layer_groups) == 2
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    whole = [LayerGroup("all", ("0.weight", "0.bias", "1.weight", "1.bias"))]
    assert FineTuneModel.from_module(net, net[2], layer_groups=whole).layer_groups == tuple(whole)


def test_given_groups_that_are_not_a_partition_raise() -> None:
    backbone = Custom()
    with pytest.raises(ValueError, match=r"3 parameters of the backbone are in no group \(token, first\.weight"):
        FineTuneModel(backbone, nn.Linear(2, 2), layer_groups=[backbone.second])
    with pytest.raises(ValueError, match=r"'second\.0\.weight' is in both 'second' and 'second\.0'"):
        FineTuneModel(backbone, nn.Linear(2, 2), layer_groups=[backbone.second, backbone.second[0]])
    with pytest.raises(ValueError, match="'third' in group 'a' is not a parameter of the backbone"):
        FineTuneModel(backbone, nn.Linear(2, 2), layer_groups=[LayerGroup("a", ("third",))])
    with pytest.raises(ValueError, match=r"Linear is not a submodule of the backbone \(Custom\)"):
        FineTuneModel(backbone, nn.Linear(2, 2), layer_groups=[nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="two groups have the name 'a'"):
        FineTuneModel(
            nn.Linear(2, 2),
            nn.Linear(2, 2),
            layer_groups=[LayerGroup("a", ("weight",)), LayerGroup("a", ("bias",))],
        )


trees = st.recursive(
    st.sampled_from([nn.ReLU, lambda: nn.Linear(2, 2), lambda: nn.BatchNorm1d(2)]),
    lambda children: st.lists(children, max_size=4).map(
        lambda parts: lambda: nn.Sequential(*(part() for part in parts))
    ),
    max_leaves=12,
)


@given(tree=trees, data=st.data())
def test_any_module_tree_is_partitioned_in_order_and_frozen_from_the_input(tree: object, data: st.DataObject) -> None:
    backbone = tree()  # type: ignore[operator]
    model = FineTuneModel(backbone, nn.Linear(2, 2))
    every = [name for group in model.layer_groups for name in group.parameter_names]
    assert every == [name for name, _ in backbone.named_parameters()]
    assert len({group.name for group in model.layer_groups}) == len(model.layer_groups)

    count = data.draw(st.integers(0, len(model.layer_groups)))
    model.freeze_backbone(trainable_groups=count)
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    assert trained == [
        name for group in model.layer_groups[len(model.layer_groups) - count :] for name in group.parameter_names
    ]
