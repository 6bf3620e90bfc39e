"""`variants.py` and `equality.py`: correct variants pass, and wrong ones raise with the reason."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from subjects import equality, networks, variants
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def _network(name: str) -> networks.Network:
    return networks.build_network(name, batch_size=2, image_size=32, device=CPU)


def _variant(network: networks.Network, kind: str) -> variants.Variant:
    return next(variant for variant in variants.variants_of(network) if variant.kind == kind)


@pytest.mark.parametrize("kind", ["unfrozen", "partial", "frozen", "limit"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_correct_variants_pass(name: str, kind: str) -> None:
    network = _network(name)
    equality.prove_equal(_variant(network, kind), network)


def _other_logits(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * 1.05)


def _statistics_that_move(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def enter() -> None:
        variant.enter()
        # The effect of a trainer's train() on a backbone that was frozen by requires_grad alone.
        for module in network.model.modules():
            module.training = True

    def logits() -> Tensor:
        # The features are computed before the statistics change, so only the buffers differ.
        network.model.backbone.eval()
        answer = variant.logits()
        nn.Module.train(network.model.backbone, True)
        with torch.no_grad():
            network.model.backbone(network.images)
        return answer

    return replace(variant, enter=enter, logits=logits)


def _another_gradient(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        answer = variant.logits()
        if answer.requires_grad:
            answer.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]
        return answer

    return replace(variant, logits=logits)


def _nothing_frozen(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    def logits() -> Tensor:
        network.model.backbone.get_parameter("conv1.0.weight").requires_grad_(True)
        return variant.logits()

    return replace(variant, logits=logits)


def _no_graph(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits().detach())


def _not_a_number(network: networks.Network, variant: variants.Variant) -> variants.Variant:
    return replace(variant, logits=lambda: variant.logits() * float("nan"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_other_logits, "logits: off by"),
        (_not_a_number, "logits: off by nan"),
        (_statistics_that_move, r"\d+ buffers of frozen layers moved: backbone.conv1.1.running_mean"),
        (_another_gradient, r"gradient of classifier.\w+: off by"),
        (_no_graph, "nothing trains: the logits have no graph"),
        (_nothing_frozen, "a gradient where none belongs, .*: backbone.conv1.0.weight"),
    ],
)
def test_a_wrong_variant_raises(
    spoil: Callable[[networks.Network, variants.Variant], variants.Variant], complaint: str
) -> None:
    network = _network("test_resnet")
    right = _variant(network, "frozen")
    with pytest.raises(equality.WrongVariantError, match=complaint):
        equality.prove_equal(spoil(network, right), network)
    equality.prove_equal(right, network)


def test_the_reference_copy_is_deleted_before_the_variant_runs() -> None:
    network = _network("test_resnet")
    copies: list[weakref.ref[nn.Parameter]] = []
    alive: list[bool] = []

    def record_copy(memo: dict[int, object]) -> nn.Module:
        own = vars(network.model).pop("__deepcopy__")
        answer = copy.deepcopy(network.model, memo)
        vars(network.model)["__deepcopy__"] = own
        copies.extend(weakref.ref(parameter) for parameter in answer.parameters())
        return answer

    def logits() -> Tensor:
        alive.extend(reference() is not None for reference in copies)
        return right.logits()

    right = _variant(network, "frozen")
    vars(network.model)["__deepcopy__"] = record_copy
    equality.prove_equal(replace(right, logits=logits), network)
    assert len(alive) == len(list(network.model.parameters()))
    assert not any(alive)


def _network_with_dropout() -> networks.Network:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 32), nn.Dropout(0.2), nn.ReLU())
    model = FineTuneModel(backbone, nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10)))
    return networks.Network("dropout", model, torch.randn(4, 3, 8, 8), torch.arange(4))


def test_a_compiled_network_with_dropout_passes() -> None:
    network = _network_with_dropout()
    compiled = variants.variants_of(network, compiled=True)
    assert [variant.kind for variant in compiled][-2:] == ["frozen", "limit"]
    for variant in compiled:
        equality.prove_equal(variant, network)
    # With torch's own random numbers, because compiled code draws others.
    with pytest.raises(equality.WrongVariantError, match="logits: off by"):
        equality.prove_equal(replace(compiled[0], proof_logits=None), network)


class _Compiler:
    """A stand-in for `torch.compile`: records the modules that it runs, and multiplies their outputs by `times`."""

    def __init__(self, times: float = 1.0) -> None:
        self.times = times
        self.ran: list[nn.Module] = []

    def __call__(self, module: nn.Module, options: object = None) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            self.ran.append(module)
            answer: Tensor = module(images) * self.times
            return answer

        return run


@pytest.mark.parametrize("build", [_network_with_dropout, lambda: _network("test_resnet")])
def test_a_wrong_compiled_variant_raises(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], networks.Network]
) -> None:
    monkeypatch.setattr(torch, "compile", _Compiler(1.05))
    network = build()
    for variant in variants.variants_of(network, compiled=True):
        with pytest.raises(equality.WrongVariantError, match="off by"):
            equality.prove_equal(variant, network)


def test_the_classifier_of_the_limit_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = _Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    network = _network("test_resnet")
    model = network.model
    ran = {}
    for variant in variants.variants_of(network, compiled=True):
        compiler.ran.clear()
        variant.enter()
        variant.logits()
        ran[variant.kind] = list(compiler.ran)
    assert ran == {
        "unfrozen": [model],
        "partial": [model],
        "frozen": [model],
        "limit": [model.backbone, model.classifier],
    }


@pytest.mark.parametrize(("precision", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_runs_in_the_given_precision(precision: variants.Precision, dtype: torch.dtype) -> None:
    network = _network("test_resnet")
    right = _variant(network, "frozen")
    dtypes: list[torch.dtype] = []

    def logits() -> Tensor:
        answer = right.logits()
        dtypes.append(answer.dtype)
        return answer

    spied = replace(right, logits=logits)
    variants.Trainer(network, precision).step_of(spied).run()
    equality.prove_equal(spied, network, precision)
    assert dtypes == [dtype, dtype]


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
def test_both_sides_train_with_the_optimizer_for_the_device(
    monkeypatch: pytest.MonkeyPatch, device: str, fused: bool | None
) -> None:
    made: list[bool | None] = []

    class Optimizer(torch.optim.AdamW):
        def __init__(self, parameters: list[nn.Parameter], *, lr: float, fused: bool | None) -> None:
            made.append(fused)
            super().__init__(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", Optimizer)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: None)
    variants.training_step(lambda: torch.zeros(()), [nn.Parameter(torch.ones(1))], torch.device(device))
    assert made == [fused]
