"""Which modules are in train and in eval mode, and that no stale caches remain."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from timm_families import FAMILIES, Family
from torch import Tensor, nn
from torture import settle

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import load_tensors

PARTIAL = ["resnet", "vision_transformer", "maxxvit", "convnext", "efficientnet", "levit"]
CACHING = ["levit", "tiny_vit", "efficientformer", "efficientformer_v2", "efficientvit_msra"]


class Block(nn.Module):
    """A layer group with running statistics and dropout: (B, 8) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(inputs)))


def three_blocks(**keywords: bool) -> FineTuneModel:
    return FineTuneModel(
        nn.Sequential(Block(), Block(), Block()), nn.Sequential(nn.Dropout(), nn.Linear(8, 2)), **keywords
    )


@pytest.mark.parametrize("trainable_groups", [0, 1, 2, 3])
def test_statistics_and_dropout_follow_their_group(trainable_groups: int) -> None:
    model = three_blocks().freeze_backbone(trainable_groups=trainable_groups).train()
    inputs = torch.randn(16, 8)
    for position, block in enumerate(model.backbone):
        trains = position >= 3 - trainable_groups
        before = {name: buffer.clone() for name, buffer in block.named_buffers()}
        first, second = block(inputs), block(inputs)
        assert torch.equal(first, second) != trains, "dropout"
        assert all(torch.equal(buffer, before[name]) != trains for name, buffer in block.named_buffers())
        assert (block.training, block.norm.training, block.dropout.training) == (trains, trains, trains)
    assert model.training
    assert model.classifier[0].training


def expected_mode(backbone: nn.Module, path: str, first_group: set[str]) -> bool:
    """Compute the rule from module names: the nearest owner with parameters decides."""
    while path and not list(backbone.get_submodule(path).parameters()):
        path = path.rpartition(".")[0]
        if not path:
            return any(p.requires_grad for name, p in backbone.named_parameters() if name in first_group)
    return any(parameter.requires_grad for parameter in backbone.get_submodule(path).parameters())


@pytest.mark.parametrize("name", PARTIAL)
def test_every_module_of_a_timm_network_follows_the_rule(name: str) -> None:
    family = FAMILIES[name]
    model = FineTuneModel.from_timm(family.architecture, num_classes=3, **family.keywords)
    first_group = set(model.layer_groups[0].parameter_names)
    for trainable_groups in range(len(model.layer_groups) + 1):
        model.freeze_backbone(trainable_groups=trainable_groups)
        modes = {path: module.training for path, module in model.backbone.named_modules()}
        assert modes == {path: expected_mode(model.backbone, path, first_group) for path in modes}
        model.eval()
        assert not any(module.training for module in model.modules())
        model.train()
        assert modes == {path: module.training for path, module in model.backbone.named_modules()}


def test_norm_eval_fixes_statistics_of_trainable_groups() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3, norm_eval=True).unfreeze_backbone().train()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    norm_weights = [name for name in weights if ".bn1.weight" in name]
    assert norm_weights
    assert not any(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    with model.assert_frozen():
        model(torch.randn(4, 3, 32, 32))
    assert "backbone.bn1.running_mean" in model.frozen_fingerprint()


class MovingNorm(nn.Module):
    """A normalization layer with the buffer names of Keras: (B, 8) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.activation = nn.PReLU(8)
        self.register_buffer("moving_mean", torch.zeros(8))
        self.register_buffer("moving_variance", torch.ones(8))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.moving_mean.lerp_(inputs.mean(0).detach(), 0.1)
            self.moving_variance.lerp_(inputs.var(0).detach(), 0.1)
        return self.activation(self.gain * (inputs - self.moving_mean) / self.moving_variance.sqrt())


class ImagesOfOneMean(nn.Module):
    """A whole network with the mean of the images in a buffer, which is not a normalization layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.zeros(8))
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.dropout(self.linear(inputs - self.pixel_mean))


STATISTICS = {
    "home-made": MovingNorm,
    "torch's instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Flatten()
    ),
    "torch's lazy batch norm": nn.LazyBatchNorm1d,
    "timm's norm with activation": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)), timm.layers.BatchNormAct2d(8, act_layer=nn.PReLU), nn.Flatten()
    ),
    "timm's evonorm": lambda: nn.Sequential(nn.Unflatten(1, (8, 1, 1)), timm.layers.EvoNorm2dB0(8), nn.Flatten()),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_norm_eval_finds_statistics_by_all_common_names(kind: str) -> None:
    def moved(*, norm_eval: bool) -> bool:
        backbone = nn.Sequential(nn.Linear(8, 8), STATISTICS[kind](), ImagesOfOneMean())
        model = FineTuneModel(backbone, nn.Linear(8, 2), norm_eval=norm_eval)
        model.eval()(torch.zeros(2, 8))  # initializes the lazy layer
        model.unfreeze_backbone().train()
        assert backbone[2].dropout.training
        before = {name: buffer.clone() for name, buffer in backbone[1].named_buffers()}
        model(torch.randn(16, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert before
        return any(not torch.equal(buffer, before[name]) for name, buffer in backbone[1].named_buffers())

    assert moved(norm_eval=False)
    assert not moved(norm_eval=True)


def test_norm_eval_does_not_change_dropout_and_the_classifier() -> None:
    model = three_blocks(norm_eval=True).train()
    model.classifier.append(nn.BatchNorm1d(2))
    model.train()
    assert [block.norm.training for block in model.backbone] == [False] * 3
    assert all(block.dropout.training for block in model.backbone)
    assert model.classifier[-1].training


@pytest.mark.parametrize("trainable_groups", [0, 2, 3])
def test_eval_sets_every_module(trainable_groups: int) -> None:
    """If `train()` skips a frozen part, its dropout stays on (as in segmentation_models_pytorch)."""
    model = three_blocks().train()
    model.freeze_backbone(trainable_groups=trainable_groups)
    nn.Module.train(model, True)  # a trainer that does not call the model's train()
    nn.Sequential(model).eval()
    assert not any(module.training for module in model.modules())
    inputs = torch.randn(4, 8)
    assert torch.equal(model(inputs), model(inputs))


def test_dropout_is_off_if_everything_is_frozen() -> None:
    model = FineTuneModel(nn.Linear(8, 8), nn.Dropout()).train().freeze_backbone()
    inputs = torch.randn(4, 8)
    assert not model.classifier.training
    assert torch.equal(model(inputs), model(inputs))
    assert model.unfreeze_backbone().classifier.training


def test_train_of_an_outer_module_keeps_frozen_modules_in_eval_mode() -> None:
    model = three_blocks().freeze_backbone(trainable_groups=1)
    nn.ModuleDict({"network": model}).eval().train()
    assert [block.training for block in model.backbone] == [False, False, True]


def from_the_meta_device(model: FineTuneModel) -> FineTuneModel:
    return model.to("meta").to_empty(device="cpu")


def with_assigned_weights(model: FineTuneModel) -> FineTuneModel:
    names = dict(model.named_parameters())
    loaded = {name: nn.Parameter(t.clone()) if name in names else t for name, t in model.state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    return model


def with_swapped_weights(model: FineTuneModel) -> FineTuneModel:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    "convert", [FineTuneModel.bfloat16, from_the_meta_device, with_assigned_weights, with_swapped_weights]
)
def test_what_is_frozen_stays_so_in_new_parameters(
    convert: Callable[[FineTuneModel], FineTuneModel],
) -> None:
    model = three_blocks().freeze_backbone(trainable_groups=1)
    frozen, modes = model.frozen_names(), [module.training for module in model.modules()]
    convert(model)
    assert model.trainable_groups == 1
    assert (model.frozen_names(), [module.training for module in model.modules()]) == (frozen, modes)
    with model.assert_frozen():
        model.train()(torch.randn(16, 8, dtype=model.classifier[1].weight.dtype)).sum().backward()
    assert all((parameter.grad is None) != parameter.requires_grad for parameter in model.parameters())


def test_freezing_by_hand_takes_full_effect_at_the_next_train() -> None:
    model = three_blocks().train()
    model(torch.randn(4, 8)).sum().backward()
    model.backbone[0].requires_grad_(False)
    model.train()
    assert [block.training for block in model.backbone] == [False, True, True]
    assert model.backbone[0].linear.weight.grad is None
    assert model.backbone[1].linear.weight.grad is not None
    model.backbone[0].requires_grad_(True)
    assert model.train().backbone[0].training


def caching_model(name: str) -> tuple[FineTuneModel, Tensor]:
    family: Family = FAMILIES[name]
    model = FineTuneModel.from_timm(family.architecture, num_classes=3, **family.keywords)
    settle(model, images := family.images(1))
    return model.freeze_backbone(), images


def test_a_plain_timm_network_keeps_stale_caches() -> None:
    """A plain timm network that is loaded in eval mode still uses the cached old biases."""
    network = timm.create_model("levit_128s", img_size=32, num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        biases = {name: torch.randn_like(t) for name, t in network.state_dict().items() if "attention_biases" in name}
        network.load_state_dict(biases, strict=False)
        assert torch.equal(network(images), before)
        assert not torch.allclose(network.eval()(images), before)


@pytest.mark.parametrize("name", CACHING)
def test_no_load_leaves_stale_attention_biases(name: str) -> None:
    model, images = caching_model(name)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {
        name: 30 * torch.randn_like(tensor) if "attention_biases" in name else tensor
        for name, tensor in original.items()
    }
    with torch.no_grad():
        twin = copy.deepcopy(model)
        before = twin.eval()(images)
        twin.load_state_dict(weights)
        expected = twin.train().eval()(images)
    assert not torch.allclose(before, expected)
    outer = nn.ModuleDict({"network": model})

    def load_from_outside(tensors: dict[str, Tensor]) -> None:
        outer.load_state_dict({f"network.{key}": tensor for key, tensor in tensors.items()})

    def load_what_a_file_holds(tensors: dict[str, Tensor]) -> None:
        load_tensors(model, tensors)

    def load_into_the_backbone(tensors: dict[str, Tensor]) -> None:
        prefix = "backbone."
        model.backbone.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def load_into_its_parts(tensors: dict[str, Tensor]) -> None:
        for path, part in model.backbone.named_children():
            prefix = f"backbone.{path}."
            part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    # The frozen backbone is in eval mode, and caches, in both modes of the model.
    for load, mode in (
        (model.load_state_dict, False),
        (model.load_state_dict, True),
        (load_from_outside, True),
        (load_what_a_file_holds, False),
        (load_into_the_backbone, False),
        (load_into_the_backbone, True),
        (load_into_its_parts, True),
    ):
        model.load_state_dict(original)
        model.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(model(images), before)
            load(weights)
            assert (model.training, model.backbone.training) == (mode, False)
            torch.testing.assert_close(model(images), expected)


def test_a_load_into_the_reassembled_network_leaves_no_stale_biases() -> None:
    model, images = caching_model("tiny_vit")
    network = model.to_module()
    weights = {
        name: 30 * torch.randn_like(tensor) if "attention_biases" in name else tensor
        for name, tensor in network.state_dict().items()
    }
    with torch.no_grad():
        before = model.eval()(images)
        network.load_state_dict(weights)
        after = model(images)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model.train().eval()(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_clear_caches_on_load(copied: Callable[[FineTuneModel], FineTuneModel]) -> None:
    model, images = caching_model("levit")
    twin = copied(model.eval())
    with torch.no_grad():
        before = twin(images)
        twin.backbone.load_state_dict({name: 2 * tensor for name, tensor in twin.backbone.state_dict().items()})
        loaded = twin(images)
        torch.testing.assert_close(loaded, twin.train().eval()(images))
    assert not torch.allclose(loaded, before)


@pytest.mark.long
def test_a_compiled_model_clears_caches_on_load() -> None:
    model, images = caching_model("levit")
    compiled = torch.compile(model.eval(), backend="aot_eager")
    with torch.no_grad():
        before = compiled(images)
        torch.testing.assert_close(before, model(images))
        model.backbone.load_state_dict({name: 2 * t for name, t in model.backbone.state_dict().items()})
        torch.testing.assert_close(compiled(images), model(images))
    assert not torch.allclose(compiled(images), before)


class Doubled(nn.Linear):
    """A classifier that caches a function of its weight in eval mode, until `train()` is called."""

    cache: Tensor | None = None

    def train(self, mode: bool = True) -> Doubled:
        self.cache = None
        super().train(mode)
        return self

    def forward(self, features: Tensor) -> Tensor:
        if self.training or self.cache is None:
            self.cache = 2 * self.weight.detach()
        return nn.functional.linear(features, self.cache)


def test_a_classifier_clears_caches_on_load() -> None:
    model = FineTuneModel(nn.Linear(2, 2), Doubled(2, 2)).eval()
    inputs = torch.randn(3, 2)
    before = model(inputs)
    model.load_state_dict(
        {name: 2 * tensor if "classifier" in name else tensor for name, tensor in model.state_dict().items()}
    )
    torch.testing.assert_close(model(inputs), 2 * before)


class Strict(nn.Linear):
    def train(self, mode: bool) -> Strict:  # type: ignore[override]
        super().train(mode)
        return self


def test_a_load_works_with_a_train_method_without_default() -> None:
    model = FineTuneModel(nn.Sequential(Strict(2, 2)), nn.Linear(2, 2))
    model.load_state_dict(model.state_dict())
    assert model.backbone[0].training


def test_only_modules_that_override_train_have_the_hook() -> None:
    def hooked(network: nn.Module) -> list[str]:
        return [path for path, module in network.named_modules() if module._load_state_dict_post_hooks]

    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert hooked(FineTuneModel.from_module(network, network[1])) == [""]
    assert hooked(network) == []
    model, _ = caching_model("levit")
    attentions = [path for path, module in model.named_modules() if hasattr(module, "attention_bias_cache")]
    assert len(attentions) > 1
    assert hooked(model) == ["", *attentions]
    again = FineTuneModel(model.backbone, nn.Identity())
    assert hooked(again) == ["", *attentions]
    assert all(len(again.get_submodule(path)._load_state_dict_post_hooks) == 1 for path in attentions)


def test_a_load_does_not_change_modes_and_gradients() -> None:
    model = three_blocks().train()
    model(torch.randn(4, 8)).sum().backward()
    model.backbone[1].eval()  # set by hand until the next train()
    modes = [module.training for module in model.modules()]
    gradient = model.backbone[0].linear.weight.grad
    model.load_state_dict(model.state_dict())
    assert modes == [module.training for module in model.modules()]
    assert model.backbone[0].linear.weight.grad is gradient


class Encoder(nn.Module):
    """A transformer on padded sequences, averaged without padding: (B, T, 8), (B, T) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, sequences: Tensor, padding: Tensor) -> Tensor:
        encoded = self.encoder(sequences, src_key_padding_mask=padding)
        return encoded.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


@pytest.mark.parametrize("frozen_layers", [0, 1, 2, 3])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_frozen_layers_of_a_transformer_take_a_padding_mask(frozen_layers: int) -> None:
    """torch passes nested tensors from frozen layers in eval mode to trainable ones, which do not support them."""
    model = FineTuneModel(Encoder(), nn.Linear(8, 2))
    sequences, padding = torch.randn(4, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [1], [4]])
    expected = model.unfreeze_backbone()(sequences, padding=padding)
    expected.sum().backward()
    layers = model.backbone.encoder.layers
    gradients = [layer.linear1.weight.grad.clone() for layer in layers]
    layers[:frozen_layers].requires_grad_(False)
    for mode in (True, False):
        model.zero_grad()
        outputs = model.train(mode)(sequences, padding=padding)
        torch.testing.assert_close(outputs, expected)
        outputs.sum().backward()
        for position, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
            if position < frozen_layers:
                assert layer.linear1.weight.grad is None
            else:
                torch.testing.assert_close(layer.linear1.weight.grad, gradient)
        with torch.no_grad():
            torch.testing.assert_close(model(sequences, padding=padding), expected)
    assert model.backbone.encoder.use_nested_tensor == (frozen_layers in {0, 3})
    model.unfreeze_backbone()
    assert model.backbone.encoder.use_nested_tensor


def test_nested_tensors_that_were_off_stay_off() -> None:
    backbone = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    model = FineTuneModel(backbone, nn.Linear(8, 2))
    backbone.layers[0].requires_grad_(False)
    model.train().unfreeze_backbone()
    assert not backbone.use_nested_tensor


class HomeMadeDropout(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, 0.5, self.training)


SHARED = {"torch's": nn.Dropout, "timm's": lambda: timm.layers.DropPath(0.1), "home-made": HomeMadeDropout}


@pytest.mark.parametrize("kind", SHARED)
def test_one_dropout_in_a_frozen_and_a_trainable_part_warns(kind: str) -> None:
    dropout = SHARED[kind]()
    backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), dropout) for _ in range(3)))
    model = FineTuneModel(backbone, nn.Linear(8, 2))
    named = rf"backbone\.0\.1, which is frozen, and backbone\.2\.1, .* the same {type(dropout).__name__} object"
    with pytest.warns(UserWarning, match=named):
        model.freeze_backbone(trainable_groups=1)
    model.freeze_backbone().unfreeze_backbone()  # no warning: all places are equal


def test_shared_modules_that_do_not_depend_on_the_mode_do_not_warn() -> None:
    shared = nn.ModuleList([nn.ReLU(), nn.Dropout(0.0), timm.layers.DropPath(0.0)])
    backbone = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), *shared) for _ in range(3)))
    FineTuneModel(backbone, nn.Linear(8, 2)).freeze_backbone(trainable_groups=1)


def test_memory_shared_by_a_frozen_and_a_trainable_parameter_raises() -> None:
    model = FineTuneModel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8))
    model.backbone[0].weight.data = model.backbone[1].weight.data.t()
    before = [parameter.requires_grad for parameter in model.parameters()]
    named = r"backbone\.0\.weight would be frozen, and shares memory with backbone\.1\.weight, which trains; tie them"
    with pytest.raises(ValueError, match=named):
        model.freeze_backbone(trainable_groups=1)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    model.freeze_backbone()
    model.classifier.weight.data = model.backbone[1].weight.data
    with pytest.raises(ValueError, match=r"and shares memory with classifier\.weight"):
        model.freeze_backbone()
