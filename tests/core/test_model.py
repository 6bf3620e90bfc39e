"""FineTuneModel: inputs, outputs, memory for the backward pass, and errors."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel


class TwoInputs(nn.Module):
    """A backbone with a keyword: (B, 4), (B, 4) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)

    def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
        return self.layer(left + right)


class Tokens(nn.Module):
    """A backbone that returns the first of many tokens, like a ViT: (B, N, C) -> (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)[:, 0]


def bytes_saved_for_backward(model: nn.Module, inputs: Tensor) -> int:
    """Return the bytes of distinct storages that autograd keeps, without parameters."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(inputs)
    total = sum(storages.values())
    del outputs
    return total


def test_has_exactly_two_submodules() -> None:
    for model in (
        FineTuneModel(nn.Flatten(), nn.Linear(4, 2)),
        FineTuneModel.from_timm("test_resnet", num_classes=2, drop_rate=0.5),
        FineTuneModel.from_module(net := nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), net[1]),
    ):
        assert [name for name, _ in model.named_children()] == ["backbone", "classifier"]
        assert all(name.startswith(("backbone.", "classifier.")) for name in model.state_dict())


def test_inputs_and_keywords_reach_the_backbone() -> None:
    model = FineTuneModel(TwoInputs(), nn.Linear(8, 3))
    left, right = torch.randn(2, 5, 4)
    expected = model.classifier(model.backbone(left, right=right))
    assert torch.equal(model(left, right=right), expected)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour, self.shape = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"colour": self.colour(features), "shape": self.shape(features)}


def test_a_classifier_may_have_several_heads() -> None:
    model = FineTuneModel(nn.Linear(4, 8), Heads()).freeze_backbone()
    outputs = model(torch.randn(2, 4))
    assert {name: tuple(logits.shape) for name, logits in outputs.items()} == {"colour": (2, 3), "shape": (2, 5)}
    (outputs["colour"].sum() + outputs["shape"].sum()).backward()
    assert model.classifier.shape.weight.grad is not None
    assert model.num_classes is None


def test_gradients_reach_the_input_through_a_frozen_backbone() -> None:
    model = FineTuneModel.from_timm("test_vit", num_classes=3).freeze_backbone().train()
    plain = model.to_module().eval()
    images = torch.randn(2, 3, 160, 160, requires_grad=True)
    (ours,) = torch.autograd.grad(model(images).sum(), images)
    (theirs,) = torch.autograd.grad(plain(images).sum(), images)
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)


def test_a_small_view_does_not_keep_its_tokens_alive() -> None:
    model = FineTuneModel(Tokens(16), nn.Linear(16, 3)).freeze_backbone()
    assert bytes_saved_for_backward(model, torch.randn(4, 50, 16)) == 4 * 16 * 4
    assert bytes_saved_for_backward(model, torch.randn(1, 50, 16)) == 16 * 4


def test_a_view_is_not_copied_if_the_backbone_trains() -> None:
    model = FineTuneModel(Tokens(16), nn.Linear(16, 3))
    assert bytes_saved_for_backward(model, torch.randn(4, 50, 16)) >= 4 * 50 * 16 * 4


def test_features_are_not_copied_without_a_reason() -> None:
    seen: list[int] = []
    model = FineTuneModel(nn.Linear(4, 8), nn.Linear(8, 2)).freeze_backbone()
    model.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output.data_ptr()))
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].data_ptr()))
    model(torch.randn(2, 4))
    assert seen[0] == seen[1]


def test_no_copy_under_no_grad() -> None:
    seen: list[Tensor] = []
    model = FineTuneModel(Tokens(16), nn.Linear(16, 3)).freeze_backbone()
    model.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(4, 50, 16))
    assert seen[0].untyped_storage().nbytes() == 4 * 50 * 16 * 4


def test_freezing_is_absolute_returns_the_model_and_drops_gradients() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    for count in (0, 2, 5, 1, 1, 0):
        assert model.freeze_backbone(trainable_groups=count) is model
        parameters = dict(model.backbone.named_parameters())
        state = [{parameters[n].requires_grad for n in group.parameter_names} for group in model.layer_groups]
        assert state == [{False}] * (5 - count) + [{True}] * count
        assert all(p.grad is None for p in model.backbone.parameters() if not p.requires_grad)
    assert model.unfreeze_backbone() is model
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_replaces_no_object() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    before = [*map(id, model.modules()), *map(id, model.parameters()), *map(id, model.buffers())]
    model.freeze_backbone().unfreeze_backbone().freeze_backbone(trainable_groups=2).train()
    assert before == [*map(id, model.modules()), *map(id, model.parameters()), *map(id, model.buffers())]


@pytest.mark.parametrize("count", [-1, 6])
def test_a_count_out_of_range_raises_and_names_the_groups(count: int) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(trainable_groups=2)
    expected = rf"trainable_groups={count}: the backbone has 5 layer groups \(stem, layer1, .*\); pass 0 to 5\."
    with pytest.raises(ValueError, match=expected):
        model.freeze_backbone(trainable_groups=count)
    assert model.backbone.layer4[0].conv1.weight.requires_grad


@pytest.mark.parametrize("count", ["2", 1.0, True, None])
def test_a_count_that_is_not_an_integer_raises(count: Any) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    with pytest.raises(TypeError, match=r"has 5 layer groups \(stem, layer1, .*\); pass an integer, 0 to 5\."):
        model.freeze_backbone(trainable_groups=count)


def test_a_parameter_in_both_parts_raises() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"backbone\.0\.weight and classifier\.weight are one parameter"):
        FineTuneModel(nn.Sequential(layer), layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet18", nn.Linear(4, 2)), r"FineTuneModel: backbone='resnet18'; pass .*Module \(by name: .*from_timm"),
        ((nn.Linear(4, 4), None), r"FineTuneModel: classifier=None; pass a torch\.nn\.Module\."),
    ],
)
def test_a_part_that_is_not_a_module_raises(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FineTuneModel(*arguments)
    with pytest.raises(TypeError, match="from_module: network=None; pass a torch"):
        FineTuneModel.from_module(None, nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_classifier_of_the_wrong_width_raises_on_a_timm_backbone() -> None:
    backbone = timm.create_model("mobilenetv3_small_050", num_classes=0)
    model = FineTuneModel(backbone, nn.Linear(backbone.num_features, 3))  # timm's name for the width before its head
    with pytest.raises(ValueError, match=r"features of shape \(B, 1024\), and .* takes \(B, 288\)"):
        model(torch.randn(2, 3, 32, 32))
    assert FineTuneModel(backbone, nn.Linear(1024, 3)).num_features == 1024


def test_a_timm_backbone_may_take_more_than_images() -> None:
    class WithMore(timm.models.ResNet):
        def forward(self, images: Tensor, more: Tensor) -> Tensor:
            return torch.cat([super().forward(images), more], dim=1)

    backbone = WithMore(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=0)
    model = FineTuneModel(backbone, nn.Linear(515, 2)).freeze_backbone()
    assert model(torch.randn(2, 3, 32, 32), torch.randn(2, 3)).shape == (2, 2)


@pytest.mark.parametrize("build", [FineTuneModel, FineTuneModel.from_module])
def test_a_compiled_part_raises(build: Any) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"is compiled, .*; pass the network itself, .*: freeze, wrap, compile"):
        build(torch.compile(network, backend="eager"), network[1])
    with pytest.raises(ValueError, match="from_timm: the network is compiled"):
        FineTuneModel.from_timm(torch.compile(timm.create_model("test_resnet"), backend="eager"), num_classes=3)


def test_a_backbone_with_changed_parameters_raises() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    model.backbone.layer1.extra = nn.Linear(2, 2)
    got = r"has gained 2 parameters \(layer1\.extra\.weight, layer1\.extra\.bias\) since .*; call model\.regroup\(\)"
    for call in (
        model.freeze_backbone,
        model.unfreeze_backbone,
        model.print_trainable_parameters,
        model.group_matcher,
        partial(model.group_matcher, coarse=True),
        partial(model.param_groups, lr=0.1),
        partial(model.param_groups, lr=0.1, layer_decay=0.5),
    ):
        with pytest.raises(ValueError, match=got):
            call()
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = FineTuneModel(model.backbone, model.classifier).freeze_backbone()
    assert not any(parameter.requires_grad for parameter in again.backbone.parameters())
    model.backbone.layer1 = nn.Identity()
    model.backbone.conv1 = nn.Identity()
    with pytest.raises(ValueError, match=r"has lost \d+ parameters \(conv1\..* and \d+ more\) since"):
        model.freeze_backbone()
    assert model.train().training


def test_copies_and_pickles() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for model in (
        FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(trainable_groups=1).eval(),
        FineTuneModel.from_module(net, net[1]).freeze_backbone().eval(),
    ):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert isinstance(twin, FineTuneModel)
            assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
            assert twin.to_module().state_dict().keys() == model.to_module().state_dict().keys()
            assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_num_features_and_num_classes() -> None:
    model = FineTuneModel.from_timm("mobilenetv3_small_050", num_classes=7)
    assert (model.num_features, model.num_classes) == (1024, 7)  # num_features of the bare network is 288
    assert FineTuneModel(nn.Flatten(), nn.ReLU()).num_features is None
    with_a_head = timm.create_model("test_resnet", num_classes=20)
    assert FineTuneModel(with_a_head, nn.Linear(20, 3)).num_features == 20
    assert FineTuneModel(with_a_head, nn.Sequential(nn.ReLU(), nn.Linear(20, 3))).num_features == 20


def test_a_lazy_classifier_takes_the_width_of_the_features() -> None:
    model = FineTuneModel.from_timm("test_resnet", classifier=nn.LazyLinear(3)).freeze_backbone()
    assert model.num_features == 96
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert model.classifier.in_features == 96
    assert FineTuneModel.from_timm("test_resnet").num_classes == 1000


def test_gradient_checkpointing_is_set_in_the_backbone() -> None:
    model = FineTuneModel.from_timm("test_vit", num_classes=3)
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.set_grad_checkpointing(enable=False)
    assert not model.backbone.grad_checkpointing


def test_gradient_checkpointing_raises_if_the_backbone_has_none() -> None:
    named = r"Flatten has no gradient checkpointing, neither timm's .* nor transformers'"
    with pytest.raises(AttributeError, match=named):
        FineTuneModel(nn.Flatten(), nn.Linear(4, 2)).set_grad_checkpointing()
    network: Any = nn.Linear(4, 4)  # as in transformers' ConvNeXt: the method exists, and raises an error
    network.activation_checkpointing_enable = lambda **keywords: pytest.fail("it is not supported")
    network.supports_gradient_checkpointing = False
    with pytest.raises(AttributeError, match="Linear has no gradient checkpointing"):
        FineTuneModel(network, nn.Linear(4, 2)).set_grad_checkpointing()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_with_the_method_names_of_transformers(name: str) -> None:
    calls: list[object] = []
    network = nn.Linear(4, 4)
    setattr(network, f"{name}_enable", lambda **keywords: calls.append(keywords))
    setattr(network, f"{name}_disable", lambda: calls.append("off"))
    model = FineTuneModel(nn.Sequential(network), nn.Linear(4, 2))  # in an adapter that returns its features
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    # Reentrant checkpointing computes no gradients above a frozen stem.
    assert calls == [{f"{name}_kwargs": {"use_reentrant": False}}, "off"]


def test_gradient_checkpointing_of_a_transformers_network() -> None:
    transformers = pytest.importorskip("transformers")

    class Pooled(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.network(images).pooler_output

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    network = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=8))
    model = FineTuneModel(Pooled(network), nn.Linear(8, 2))
    model.set_grad_checkpointing()
    assert network.is_gradient_checkpointing
    network.embeddings.requires_grad_(False)
    model.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    above = [parameter for name, parameter in network.named_parameters() if "attention" in name]
    assert above
    assert all(parameter.grad is not None for parameter in above)
    model.set_grad_checkpointing(False)
    assert not network.is_gradient_checkpointing


def test_data_config_of_timm_works_on_the_model() -> None:
    network = timm.create_model("tf_efficientnet_lite0")
    expected = timm.data.resolve_model_data_config(network)
    model = FineTuneModel.from_timm(network, num_classes=3)
    assert timm.data.resolve_model_data_config(model) == expected
    assert model.default_cfg == model.pretrained_cfg  # the older name, used by timm's ONNX export
    assert not hasattr(FineTuneModel(nn.Flatten(), nn.Linear(4, 2)), "pretrained_cfg")


def test_the_table_of_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(
        trainable_groups=1
    ).print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["group", "parameters", "state", "mode"]
    assert lines[1].split()[0] == "stem"
    assert lines[1].split()[2:] == ["frozen", "eval"]
    assert lines[-3].split()[0] == "layer4"
    assert lines[-3].split()[2:] == ["trainable", "train"]
    assert lines[-2].split()[0] == "classifier"
    assert lines[-1].startswith("trainable parameters: ")


def test_the_mode_is_kept_while_nothing_trains() -> None:
    model = FineTuneModel(nn.BatchNorm1d(4), nn.Sequential(nn.Dropout(), nn.Linear(4, 2))).train()
    model.classifier.requires_grad_(False)
    model.freeze_backbone()
    assert not any(module.training for module in model.modules() if module is not model)
    model.unfreeze_backbone()
    assert model.backbone.training
    assert not model.classifier.training


def test_per_sample_gradients_by_torch_func() -> None:
    model = FineTuneModel(Tokens(4), nn.Linear(4, 2)).freeze_backbone()
    inputs = torch.randn(3, 5, 4)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"classifier.weight": weight}, (sample[None],)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(model.classifier.weight.detach(), inputs)
    expected = [torch.autograd.grad(model(sample[None]).sum(), model.classifier.weight)[0] for sample in inputs]
    torch.testing.assert_close(gradients, torch.stack(expected))


class Table(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.table


def test_a_buffer_shared_by_two_modules_is_in_the_fingerprint() -> None:
    table = torch.ones(3)
    model = FineTuneModel(nn.Sequential(Table(table), Table(table)), nn.Linear(3, 2)).freeze_backbone()
    with model.assert_frozen():
        model(torch.ones(2, 3))
    with pytest.raises(AssertionError, match="table"), model.assert_frozen():
        table.zero_()


def test_integer_parameters_are_not_changed() -> None:
    backbone = nn.Linear(2, 2)
    backbone.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    model = FineTuneModel(backbone, nn.Linear(2, 2)).freeze_backbone().unfreeze_backbone()
    assert model.backbone.weight.requires_grad
    assert not model.backbone.codes.requires_grad
