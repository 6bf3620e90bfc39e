"""A timm network's own classifier is kept if it computes the same function, else it raises; one per family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm_families import FAMILIES, SMALL, Family, each
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.splitting.timm_head import DistilledClassifier

CLASSES = 7
# One head per branch or stage; an auxiliary head; a head on its own token.
REFUSED = {
    "crossvit": "is not one that takes one feature vector",
    "efficientvim": "is not one that takes one feature vector",
    "volo": "is not the same function any more",
}
TWO_TOKENS = {
    "deit": Family("deit_tiny_distilled_patch16_224", 32, 5.9, takes_img_size=True),
    "pit": Family("pit_ti_distilled_224", 32, 5.1, takes_img_size=True),
}
ON_ONE_EMBEDDING = ("efficientformer", "efficientformer_v2", "levit", "swiftformer")
# timm initializes these heads with zeros, so logits alone would agree with any split.
ZERO_HEADS = {"hiera": "head", "hieradet_sam2": "head", "mlp_mixer": "norm", "sequencer": "norm"}


def snapshot(network: nn.Module) -> dict[str, Any]:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "tensors": {name: (id(tensor), tensor.clone()) for name, tensor in tensors.items()},
        "trains": {name: parameter.requires_grad for name, parameter in network.named_parameters()},
        "modes": {name: module.training for name, module in network.named_modules()},
        "caches": {name: dict(m.attention_bias_cache) for name, m in network.named_modules() if has_cache(m)},
        "random": torch.get_rng_state(),
    }


def has_cache(module: nn.Module) -> bool:
    return isinstance(getattr(module, "attention_bias_cache", None), dict)


def assert_as_before(network: nn.Module, before: dict[str, Any], *, except_below: tuple[str, ...] = ()) -> None:
    """Assert that the network's remaining tensors are unchanged, and that only the classifier is missing."""
    after = snapshot(network)
    assert torch.equal(after["random"], before["random"])
    for kind in ("trains", "modes", "caches"):
        for name, value in before[kind].items():
            if not name.startswith(except_below):
                assert after[kind][name] == value, (kind, name)
    for name, (identity, tensor) in before["tensors"].items():
        if not name.startswith(except_below):
            assert after["tensors"][name][0] == identity, name
            assert torch.equal(after["tensors"][name][1], tensor), name


def give_values(heads: nn.Module | tuple[nn.Module, ...]) -> None:
    for head in heads if isinstance(heads, tuple) else (heads,):
        for parameter in head.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(
    "name", [*each(SMALL), *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in SMALL)]
)
def test_an_own_classifier_computes_the_same_function_or_raises(name: str) -> None:
    family = FAMILIES[name]
    network: Any = family.build(num_classes=CLASSES)
    give_values(network.get_classifier())
    plain: Any = copy.deepcopy(network)
    before = snapshot(network)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name] + ".*; pass num_classes=.* or classifier="):
            FineTuneModel.from_timm(network)
        assert_as_before(network, before)
        return
    model = FineTuneModel.from_timm(network)
    paths: tuple[str, ...] = model._reassembly.paths  # type: ignore[attr-defined]
    assert_as_before(network, before, except_below=paths)

    exactly = not any(isinstance(plain.get_submodule(path), nn.Conv2d) for path in paths)
    images = family.images()
    outputs = []
    for either in (model.train(), plain.train()):
        torch.manual_seed(5)  # for drop path
        outputs.append(either(images))
        outputs[-1].square().sum().backward()
    assert_close(*outputs, exactly=exactly)
    gradients = {
        model._reassembly.original_name(own_name): parameter.grad for own_name, parameter in model.named_parameters()
    }
    for own_name, parameter in plain.named_parameters():
        gradient = gradients.pop(own_name)
        assert gradient is not None, own_name
        assert_close(gradient.reshape_as(parameter), parameter.grad, exactly=exactly)
    assert not gradients
    for own_name, buffer in plain.named_buffers():
        if not own_name.startswith(paths):
            assert_close(model.backbone.get_buffer(own_name), buffer, exactly=exactly)

    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.std() > 0
        assert_close(logits, plain.eval()(images), exactly=exactly)
        again = model.to_module().eval()
        assert_close(again(images), plain(images), exactly=True)
        assert torch.equal(model(images), logits), "the model is another after to_module()"
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert {p.data_ptr() for p in again.parameters()} == {p.data_ptr() for p in model.parameters()}


def assert_close(actual: Tensor, expected: Tensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(actual, expected)
    else:  # not with an absolute tolerance, which accepts any small values
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-9


def test_a_classifier_of_all_tokens_with_one_used_output_is_kept() -> None:
    small = {"img_size": 64, "pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
    # Like CLIP's pooling: attention, then a projection of each token.
    network: Any = timm.create_model("resnet50_clip", **small)
    plain = copy.deepcopy(network).eval()
    zero_head = copy.deepcopy(network)
    nn.init.zeros_(zero_head.head.proj.weight)
    nn.init.zeros_(zero_head.head.proj.bias)
    model = FineTuneModel.from_timm(network).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(model(images), plain(images), exactly=False)
    with pytest.raises(ValueError, match="its logits are all equal"):
        FineTuneModel.from_timm(zero_head)


@pytest.mark.parametrize("name", ["dla46x_c", "levit_128s"])  # a convolution kept as a linear layer, two heads
def test_a_kept_classifier_keeps_its_mode_and_stays_frozen(name: str) -> None:
    network: Any = timm.create_model(name, num_classes=CLASSES).eval()
    for head in [network.get_classifier()] if name == "dla46x_c" else network.get_classifier():
        head.requires_grad_(False)
    model = FineTuneModel.from_timm(network)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.classifier.parameters())
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


@pytest.mark.parametrize("name", TWO_TOKENS)
def test_heads_on_two_tokens_raise(name: str) -> None:
    network = TWO_TOKENS[name].build(num_classes=CLASSES)
    before = snapshot(network)
    with pytest.raises(ValueError, match="not the same function any more"):
        FineTuneModel.from_timm(network)
    assert_as_before(network, before)


@pytest.mark.parametrize("name", ON_ONE_EMBEDDING)
def test_two_heads_on_one_embedding_equal_timms_in_both_modes(name: str) -> None:
    family = FAMILIES[name]
    network: Any = family.build(num_classes=CLASSES)
    plain: Any = copy.deepcopy(network)
    model = FineTuneModel.from_timm(network)
    classifier = model.classifier
    assert isinstance(classifier, DistilledClassifier)
    images = family.images()
    for enabled in (True, False):
        plain.set_distilled_training(enabled)
        classifier.set_distilled_training(enabled)
        for mode in (True, False):
            torch.manual_seed(5)
            ours = model.train(mode)(images)
            torch.manual_seed(5)
            theirs = plain.train(mode)(images)
            assert isinstance(ours, tuple) is isinstance(theirs, tuple) is (enabled and mode)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_distilled_training_that_was_on_stays_on() -> None:
    network: Any = FAMILIES["levit"].build(num_classes=CLASSES)
    network.set_distilled_training(True)
    images = FAMILIES["levit"].images()
    model = FineTuneModel.from_timm(network).train()
    assert isinstance(model(images), tuple)
    assert isinstance(model.to_module().train()(images), tuple)


def test_distilled_training_is_not_set_on_a_new_classifier() -> None:
    network: Any = TWO_TOKENS["deit"].build(num_classes=CLASSES)
    network.set_distilled_training(True)
    model = FineTuneModel.from_timm(network, num_classes=3).train()
    assert model(TWO_TOKENS["deit"].images()).shape == (2, 3)


@pytest.mark.parametrize("name", ZERO_HEADS)
def test_a_zero_head_does_not_hide_a_wrong_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    network: Any = family.build(num_classes=CLASSES).eval()
    right = copy.deepcopy(network)
    reset_classifier = type(network).reset_classifier

    def reset_too_much(self: Any, num_classes: int, *arguments: Any, **keywords: Any) -> None:
        reset_classifier(self, num_classes, *arguments, **keywords)
        owner = self.head if ZERO_HEADS[name] == "head" else self
        owner.norm = nn.Identity()

    with torch.no_grad():
        assert not network(family.images()).any(), "the logits would agree with those of any cut"
    assert FineTuneModel.from_timm(right).num_classes == CLASSES
    monkeypatch.setattr(type(network), "reset_classifier", reset_too_much)
    with pytest.raises(ValueError, match="not the same function any more"):
        FineTuneModel.from_timm(network)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.factor


def test_small_features_do_not_hide_a_wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = timm.create_model("test_resnet", num_classes=CLASSES)
    network.layer4.append(Times(1e-7))
    reset_classifier = type(network).reset_classifier
    assert FineTuneModel.from_timm(copy.deepcopy(network)).num_classes == CLASSES
    monkeypatch.setattr(type(network), "reset_classifier", lambda self, count: reset_classifier(self, count, "max"))
    with pytest.raises(ValueError, match="not the same function any more"):
        FineTuneModel.from_timm(network)


@pytest.mark.parametrize("seed", range(4))
def test_large_logits_do_not_reject_a_correct_split(seed: int) -> None:
    torch.manual_seed(seed)
    network: Any = timm.create_model("dla46x_c", num_classes=CLASSES)
    with torch.no_grad():  # a convolution kept as a linear layer, which sums in another order
        network.fc.weight.mul_(1e4)
    assert FineTuneModel.from_timm(network).num_classes == CLASSES


@pytest.mark.parametrize("name", ["efficientformer", "efficientvit_msra", "levit", "tiny_vit"])
@pytest.mark.parametrize("mode", [True, False])
def test_a_probe_does_not_change_caches_and_modes(name: str, mode: bool) -> None:
    family = FAMILIES[name]
    network = family.build(num_classes=CLASSES).eval()
    with torch.no_grad():
        network(family.images())
    assert any(m.attention_bias_cache for m in network.modules() if has_cache(m)), "there is a cache to leave alone"
    network.train(mode)
    before = snapshot(network)
    model = FineTuneModel.from_timm(network)
    assert_as_before(network, before, except_below=model._reassembly.paths)  # type: ignore[attr-defined]


def test_a_convolution_and_a_linear_layer_are_equal_up_to_rounding() -> None:
    network: Any = timm.create_model("dla46x_c", num_classes=CLASSES).eval()
    assert isinstance(network.get_classifier(), nn.Conv2d)
    weight = network.get_classifier().weight.detach().clone()
    model = FineTuneModel.from_timm(network)
    assert isinstance(model.classifier, nn.Linear)
    assert torch.equal(model.classifier.weight, weight.flatten(1))
