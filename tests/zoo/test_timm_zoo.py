"""Timm architectures with a new classifier, one per family: logits, layer groups and learning rates."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm_families import FAMILIES, SMALL, each
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.layers.discovery import SMALLEST_LAST_SHARE

CLASSES = 7
LARGE = FAMILIES.keys() - SMALL.keys()
# timm has no `group_matcher` for these, so their depth is by layer group.
WITHOUT_MATCHER = {
    "csatv2": ("stem_dct", "stages.0", "stages.1", "stages.2", "stages.3"),
    "metaformer": ("stem", "stages.0", "stages.1", "stages.2", "stages.3"),
    "pit": ("stem", "transformers.0", "transformers.1", "transformers.2"),
}
# Their classifier is more than one linear layer, so a new linear layer cannot replace it.
NOT_REVERSIBLE = {
    "crossvit",
    "efficientformer",
    "efficientformer_v2",
    "efficientvim",
    "efficientvit_msra",
    "iformer",
    "levit",
    "repvit",
    "shvit",
    "swiftformer",
    "volo",
}
ENCODERS = (
    "deepseek_vit_412m_enc",
    "gemma4_vit_167m_enc",
    "gemma4_vit_570m_enc",
    "mobilenetv5_300m_enc",
    "qwen3_vit_306m_enc",
    "qwen3_vit_416m_enc",
    "qwen3_vit_88m_enc",
)


class Fresh(NamedTuple):
    """The same architecture from timm and as a FineTuneModel with one seed; large ones on the meta device in CI."""

    family: str
    theirs: Any
    model: FineTuneModel


def build(name: str, device: str = "cpu") -> Fresh:
    family = FAMILIES[name]
    with torch.device(device):
        torch.manual_seed(3)
        theirs = family.build(num_classes=CLASSES)
        torch.manual_seed(3)
        model = FineTuneModel.from_timm(family.architecture, num_classes=CLASSES, **family.keywords)
    return Fresh(name, theirs.eval(), model.eval())


@pytest.fixture(scope="module", params=each(FAMILIES))
def fresh(request: pytest.FixtureRequest) -> Fresh:
    """Build it once for all tests of a family; no test changes its weights or buffers."""
    return build(request.param, "cpu" if request.param in SMALL else "meta")


def test_width_logits_and_to_module(fresh: Fresh) -> None:
    if fresh.family in LARGE:
        pytest.skip("without values in CI; with them behind -m slow")
    check_width_logits_and_to_module(fresh)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LARGE))
def test_width_logits_and_to_module_of_large_ones(name: str) -> None:
    check_width_logits_and_to_module(build(name))


def check_width_logits_and_to_module(fresh: Fresh) -> None:
    images = FAMILIES[fresh.family].images()
    model, theirs = fresh.model, fresh.theirs
    with torch.no_grad():
        features, logits = model.backbone(images), model(images)
        assert features.shape == (2, model.num_features)
        assert logits.shape == (2, CLASSES)
        if fresh.family in NOT_REVERSIBLE:
            with pytest.raises(ValueError, match=r"to_module: .* has more in its classifier than one linear layer"):
                model.to_module()
            return
        expected = theirs(images)
        assert_same(logits, expected, exactly=not isinstance(theirs.get_classifier(), nn.Conv2d))
        plain = model.to_module().eval()
        assert_same(plain(images), expected, exactly=True)
        assert torch.equal(model(images), logits), "the model is another after to_module()"
    assert plain.state_dict().keys() == theirs.state_dict().keys()
    ours = {parameter.data_ptr() for parameter in model.parameters() if parameter.numel()}
    assert {parameter.data_ptr() for parameter in plain.parameters() if parameter.numel()} == ours


def assert_same(actual: Tensor, expected: Tensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(actual, expected)
    else:  # not with an absolute tolerance, which accepts any small values
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layer_groups_are_an_ordered_complete_partition(fresh: Fresh) -> None:
    check_partition(fresh.model)
    names = tuple(group.name for group in fresh.model.layer_groups)
    assert names == WITHOUT_MATCHER.get(fresh.family, names)
    modules_and_parameters = {name for name, _ in fresh.model.backbone.named_modules()} | {
        name for name, _ in fresh.model.backbone.named_parameters()
    }
    assert names[0] == ("stem_dct" if fresh.family == "csatv2" else "stem")
    assert set(names[1:]) <= modules_and_parameters, "a name that stands nowhere in the network"


def check_partition(model: FineTuneModel) -> None:
    backbone: Any = model.backbone
    in_groups = [name for group in model.layer_groups for name in group.parameter_names]
    assert sorted(in_groups) == sorted(name for name, _ in backbone.named_parameters())
    assert all(group.parameter_names for group in model.layer_groups)
    names = [group.name for group in model.layer_groups]
    assert len(set(names)) == len(names)
    if hasattr(backbone, "group_matcher"):
        try:
            matcher = backbone.group_matcher(coarse=True)
        except AssertionError:  # rdnet has none
            matcher = backbone.group_matcher(coarse=False)
        depth = group_parameters(backbone, matcher, reverse=True)
        depths = [{depth[name] for name in group.parameter_names} for group in model.layer_groups]
        assert all(len(of_group) == 1 for of_group in depths[:-1])
        assert depths == sorted(depths, key=min)
        # timm's last group may be a norm or a position table, which joins the block before it.
        assert depths[-1] == set(range(min(depths[-1]), max(depth.values()) + 1))
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    last = sum(sizes[name] for name in model.layer_groups[-1].parameter_names)
    assert last >= SMALLEST_LAST_SHARE * sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", timm.list_models(exclude_filters=["*_enc"]))
def test_layer_groups_of_the_whole_zoo(architecture: str) -> None:
    with torch.device("meta"):
        check_partition(FineTuneModel.from_timm(architecture, num_classes=CLASSES))


def test_exactly_the_last_groups_get_gradients(fresh: Fresh) -> None:
    if fresh.family in LARGE:
        pytest.skip("without values in CI; with them behind -m slow")
    count = len(fresh.model.layer_groups)
    for trainable_groups in sorted({1, count // 2}):
        check_gradients(fresh, trainable_groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_exactly_the_last_groups_get_gradients_for_every_count(name: str) -> None:
    fresh = build(name)
    for trainable_groups in range(len(fresh.model.layer_groups) + 1):
        check_gradients(fresh, trainable_groups)


def check_gradients(fresh: Fresh, trainable_groups: int) -> None:
    model = copy.deepcopy(fresh.model).train().freeze_backbone(trainable_groups=trainable_groups)
    first = len(model.layer_groups) - trainable_groups
    in_training = {name for group in model.layer_groups[first:] for name in group.parameter_names}
    below = {name for group in model.layer_groups[:first] for name in group.parameter_names}
    before = {name: buffer.clone() for name, buffer in model.backbone.named_buffers()}
    model(FAMILIES[fresh.family].images()).square().sum().backward()

    gradients = {name: parameter.grad for name, parameter in model.backbone.named_parameters()}
    unused = {name for name in in_training if name in fresh_never_trained(model)}
    assert {name for name, gradient in gradients.items() if gradient is not None} == in_training - unused
    trained = [*model.classifier.parameters(), *(p for p in model.backbone.parameters() if p.requires_grad)]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    moved = {name for name, buffer in model.backbone.named_buffers() if not torch.equal(buffer, before[name])}
    for name in before:
        owner = name.rpartition(".")[0]
        beside = {other for other in in_training | below if other.rpartition(".")[0] == owner}
        if beside & below:
            assert name not in moved, f"{name} belongs to a frozen group"
        elif beside and name.endswith("num_batches_tracked"):
            assert name in moved, f"{name} belongs to a trainable group"


def fresh_never_trained(model: FineTuneModel) -> set[str]:
    """Return the parameters that timm's `reset_classifier` freezes."""
    is_efficientvim = type(model.backbone).__name__.startswith("EfficientViM")
    return {"weights", "weights_dist"} if is_efficientvim else set()


def test_parameters_that_reset_classifier_freezes_stay_frozen() -> None:
    family = FAMILIES["efficientvim"]
    with torch.device("meta"):
        backbone: Any = family.build(num_classes=CLASSES)
        assert backbone.weights.requires_grad
        model = FineTuneModel.from_timm(family.architecture, num_classes=CLASSES, **family.keywords)
        by_hand = family.build(num_classes=CLASSES)
    by_hand.reset_classifier(0)
    with torch.device("meta"):  # independent of earlier states
        frozen_before = family.build(num_classes=CLASSES).requires_grad_(False)
        without_head = family.build(num_classes=0)
    for network in (frozen_before, without_head):
        late = FineTuneModel.from_timm(network, num_classes=3).unfreeze_backbone()
        assert [name for name, p in late.named_parameters() if not p.requires_grad] == ["backbone.weights"]
    model.unfreeze_backbone()
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["backbone.weights"]
    assert not by_hand.weights.requires_grad
    # Frozen next to trainable parameters when it was wrapped, so it counts as fixed by its author.
    wrapped = FineTuneModel(by_hand, nn.Identity()).unfreeze_backbone()
    assert [name for name, p in wrapped.named_parameters() if not p.requires_grad] == ["backbone.weights"]


def test_rates_equal_timms_on_the_plain_network(fresh: Fresh) -> None:
    model, theirs = fresh.model, fresh.theirs
    groups = model.param_groups(1.0, weight_decay=0.05, layer_decay=0.75)
    ours = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    unused_parameters = {f"backbone.{name}" for name in fresh_never_trained(model)}
    assert ours.keys() == {name for name, _ in model.named_parameters()} - unused_parameters
    if fresh.family in WITHOUT_MATCHER:
        for depth, group in enumerate(reversed(model.layer_groups), start=1):
            rates = [ours[f"backbone.{name}"][0] for name in group.parameter_names]
            assert rates == pytest.approx([0.75**depth] * len(rates))
        return
    exempt = tuple(theirs.no_weight_decay()) if hasattr(theirs, "no_weight_decay") else ()
    expected = rates_by_name(
        theirs, param_groups_layer_decay(theirs, 0.05, no_weight_decay_list=exempt, layer_decay=0.75)
    )
    assert_same_rates(model, theirs, ours, expected)


def test_timms_optimizer_factory_has_the_same_rates(fresh: Fresh) -> None:
    if fresh.family in WITHOUT_MATCHER:
        pytest.skip("timm counts each of its parameters as a layer of its own")
    ours, expected = (
        rates_by_name(network, create_optimizer_v2(network, "adamw", 1e-3, 0.05, layer_decay=0.75).param_groups)
        for network in (fresh.model, fresh.theirs)
    )
    assert_same_rates(fresh.model, fresh.theirs, ours, expected)


def rates_by_name(network: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


def assert_same_rates(
    model: FineTuneModel, theirs: Any, ours: dict[str, Any], expected: dict[str, tuple[float, float]]
) -> None:
    compared = 0
    for name, (scale, weight_decay) in expected.items():
        own_name = f"backbone.{name}"
        if own_name in ours:
            assert ours[own_name] == (pytest.approx(scale), weight_decay), name
            compared += 1
        elif name not in fresh_never_trained(model):
            assert scale == 1.0, f"{name} is in the classifier"
    assert compared == len([name for name in ours if name.startswith("backbone.")])
    assert ours["classifier.weight"] == (1.0, 0.05)
    assert ours["classifier.bias"] == (1.0, 0.0)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_encoders_raise_with_a_remedy(architecture: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"no classifier .* FineTuneModel\(backbone, classifier"):
        FineTuneModel.from_timm(architecture, num_classes=CLASSES)


def test_an_encoder_works_with_a_pooling_module() -> None:
    class Pooled(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, images: Tensor) -> Tensor:
            maps = self.encoder(images)
            return maps.mean(dim=(2, 3))

    with torch.device("meta"):
        encoder: Any = timm.create_model("mobilenetv5_300m_enc")
        model = FineTuneModel(Pooled(encoder), nn.Linear(encoder.num_features, CLASSES)).freeze_backbone()
        assert model(torch.empty(2, 3, 256, 256)).shape == (2, CLASSES)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
