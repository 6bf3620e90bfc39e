"""Heads on features: many at once equal one by one, the best is kept, and L-BFGS finds the optimum."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import HeadResult, extract_features, feature_batches, fit_heads, fit_lbfgs
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.heads.grid import StackedHeads

CPU = torch.device("cpu")
RATES = [(lr, weight_decay) for lr in (1e-3, 1e-2, 0.1) for weight_decay in (0.0, 0.5)]


def make_features(count: int = 37, width: int = 6, *, seed: int = 2, noise: float = 1.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    return TensorDataset(torch.eye(width)[targets] + noise * torch.randn(count, width, generator=generator), targets)


def fit(classifier: nn.Module, train: TensorDataset, **settings: Any) -> tuple[HeadResult, ...]:
    defaults: dict[str, Any] = {
        "learning_rates": [1e-3, 1e-2, 0.1],
        "weight_decays": [0.0, 0.5],
        "epochs": 5,
        "batch_size": 8,
        "device": CPU,
        "show_progress": False,
    }
    validation = settings.pop("validation", make_features(seed=3))
    return fit_heads(classifier, train, validation, **{**defaults, **settings})


def fit_alone(classifier: nn.Module, train: TensorDataset, lr: float, weight_decay: float, epochs: int = 5) -> None:
    """Train one head with AdamW on the model's own parameter groups, as in the README."""
    groups: Any = FineTuneModel(nn.Identity(), classifier).param_groups(lr, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    batches = feature_batches(train, 8, generator=generator, drop_last=len(train) % 8 == 1)
    classifier.train()
    for _ in range(epochs):
        for *features, targets in batches:
            inputs = features[0] if len(features) == 1 else tuple(features)
            optimizer.zero_grad()
            cross_entropy(classifier(inputs), targets).backward()
            optimizer.step()
    classifier.eval()


class TwoInputs(nn.Module):
    """A head on a tuple of features, with a 0-d parameter and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(2, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return self.left(features[0]) * self.scale + self.right(features[1]) + self.fixed


HEADS = {
    "linear": lambda: nn.Linear(6, 3),
    "linear without bias": lambda: nn.Linear(6, 3, bias=False),
    "frozen bias": lambda: _with_frozen_bias(nn.Linear(6, 3)),
    "layers": lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "two inputs": TwoInputs,
}


def _with_frozen_bias(layer: nn.Linear) -> nn.Linear:
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize("count", [37, 33])  # the last batch has five images, or one, which is left out
@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_the_grid_equals_the_head_trained_alone(name: str, count: int, device: torch.device) -> None:
    head: nn.Module = HEADS[name]()
    train, validation = make_features(count), make_features(seed=3)
    if name == "two inputs":
        train, validation = (
            TensorDataset(data.tensors[0], data.tensors[0][:, :2].clone(), data.tensors[1])
            for data in (train, validation)
        )
    together = {}
    for rates in RATES:
        alone = copy.deepcopy(head)
        fit_alone(alone, train, *rates)
        together[rates] = alone
    kept = copy.deepcopy(head)
    results = fit(kept, train, validation=validation, device=device)
    assert {(result.lr, result.weight_decay) for result in results} == set(RATES)
    for result in results:
        alone = together[result.lr, result.weight_decay]
        *features, targets = validation.tensors
        with torch.no_grad():
            logits = alone(features[0] if len(features) == 1 else tuple(features))
        assert result.validation_loss == pytest.approx(float(cross_entropy(logits, targets)), rel=1e-4)
        assert result.validation_accuracy == pytest.approx(float((logits.argmax(-1) == targets).float().mean()))
    expected = together[results[0].lr, results[0].weight_decay].state_dict()
    torch.testing.assert_close(kept.state_dict(), expected, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(tensor, head.state_dict()[key]) for key, tensor in kept.state_dict().items())


def test_the_best_on_validation_is_kept_and_is_first() -> None:
    head = nn.Linear(6, 3)
    train, validation = make_features(90, noise=0.5), make_features(60, seed=3, noise=0.5)
    results = fit(head, train, validation=validation, learning_rates=[1e-9, 0.05, 1e-5], epochs=10)
    accuracies = [result.validation_accuracy for result in results]
    assert accuracies == sorted(accuracies, reverse=True)
    assert results[0].lr == 0.05
    features, targets = validation.tensors
    assert float((head(features).argmax(-1) == targets).float().mean()) == pytest.approx(accuracies[0])
    assert accuracies[0] > accuracies[-1] + 0.2


def test_among_equally_accurate_heads_the_one_with_lower_loss_is_kept() -> None:
    data = TensorDataset(torch.eye(3) * 9, torch.arange(3))
    results = fit(nn.Linear(3, 3), data, validation=data, learning_rates=[0.1, 0.3], weight_decays=[0.0], epochs=20)
    assert [result.validation_accuracy for result in results] == [1.0, 1.0]
    assert results[0].validation_loss < results[1].validation_loss


def test_a_head_that_diverges_does_not_affect_others() -> None:
    alone, beside = nn.Linear(6, 3), nn.Linear(6, 3)
    beside.load_state_dict(alone.state_dict())
    train = make_features()
    (expected,) = fit(alone, train, learning_rates=[0.01], weight_decays=[0.1])
    results = fit(beside, train, learning_rates=[1e38, 0.01], weight_decays=[0.1])
    assert results[0].validation_loss == pytest.approx(expected.validation_loss, rel=1e-5)
    assert results[1].lr == 1e38
    assert results[1].validation_accuracy == 0
    assert not math.isfinite(results[1].validation_loss)
    torch.testing.assert_close(beside.weight, alone.weight)


def test_if_all_heads_diverge_the_classifier_is_unchanged() -> None:
    head = nn.Linear(6, 3)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"all 2 heads diverged; pass smaller learning rates than 1e\+37"):
        fit(head, make_features(), learning_rates=[1e38, 1e37], weight_decays=[0.1])
    torch.testing.assert_close(dict(head.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("learning_rates", "weight_decays"),
    [([], [0.0]), ([0.1], []), ([-0.1], [0.0]), ([math.nan], [0.0]), ([0.1], [math.inf])],
)
def test_invalid_rates_raise(learning_rates: list[float], weight_decays: list[float]) -> None:
    with pytest.raises(
        ValueError,
        match=r"(learning_rates|weight_decays)[\s\S]*(at least 1 item|greater than or equal to 0|finite number)",
    ):
        fit(nn.Linear(6, 3), make_features(), learning_rates=learning_rates, weight_decays=weight_decays)


@pytest.mark.parametrize("trainer", [fit, lambda head, data: fit_lbfgs(head, data, device=CPU)])
def test_a_frozen_classifier_raises(trainer: Any) -> None:
    with pytest.raises(ValueError, match="no parameter trains"):
        trainer(nn.Linear(6, 3).requires_grad_(False), make_features())


def test_dropout_masks_differ_between_heads_and_are_off_in_validation() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    # Equal rates: only dropout masks can differ between the two heads.
    first, second = fit(head, make_features(), learning_rates=[0.05, 0.05], weight_decays=[0.0])
    assert abs(first.validation_loss - second.validation_loss) > 1e-3  # beyond rounding
    features, targets = make_features(seed=3).tensors
    with torch.no_grad():
        loss = cross_entropy(head.eval()(features), targets)
    assert first.validation_loss == pytest.approx(float(loss), rel=1e-5)


def test_modes_and_parameter_objects_of_the_classifier_are_kept() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).train()
    head[0].eval()
    weight = head[1].weight
    for train_it in (lambda: fit(head, make_features()), lambda: fit_lbfgs(head, make_features(), device=CPU)):
        train_it()
        assert [module.training for module in head.modules()] == [True, False, True]
        assert head[1].weight is weight
        assert weight.grad is None
        assert weight.requires_grad


def test_the_same_seed_gives_the_same_heads() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(4)
        head = nn.Linear(6, 3)
        fit(head, make_features(), seed=seed)
        return head.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_many_heads_at_once_cost_at_most_a_third() -> None:
    """The benchmark measures this precisely; here, 16 small heads must cost less than 16 trainings."""
    train = make_features(256, 256)

    def seconds(run: Any) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    rates = [(lr, weight_decay) for lr in (1e-4, 1e-3, 1e-2, 0.1) for weight_decay in (0.0, 0.01, 0.1, 0.5)]
    one_by_one = seconds(lambda: [fit_alone(nn.Linear(256, 3), train, *pair, epochs=2) for pair in rates])
    together = seconds(
        lambda: fit(
            nn.Linear(256, 3),
            train,
            validation=make_features(30, 256),
            learning_rates=[1e-4, 1e-3, 1e-2, 0.1],
            weight_decays=[0.0, 0.01, 0.1, 0.5],
            epochs=2,
        )
    )
    assert together < one_by_one / 3


def objective(head: nn.Linear, features: TensorDataset, weight_decay: float) -> Tensor:
    inputs, targets = features.tensors
    penalty = weight_decay / 2 * head.weight.square().sum()
    return cross_entropy(head(inputs.to(head.weight.dtype)), targets) + penalty


def minimise_by_newton(head: nn.Linear, features: TensorDataset, weight_decay: float) -> None:
    """Return the optimum by another method, in double precision."""
    inputs, targets = features.tensors

    def loss(flat: Tensor) -> Tensor:
        weight, bias = flat[:18].view(3, 6), flat[18:]
        penalty = weight_decay / 2 * weight.square().sum()
        return cross_entropy(inputs.double() @ weight.T + bias, targets) + penalty

    flat = torch.zeros(21, dtype=torch.double)
    for _ in range(12):
        gradient, hessian = torch.func.grad(loss)(flat), torch.func.jacrev(torch.func.grad(loss))(flat)
        # A constant added to all biases has no effect, so the Hessian has no inverse.
        flat -= torch.linalg.pinv(hessian, rtol=1e-9) @ gradient
    assert torch.func.grad(loss)(flat).abs().max() < 1e-12
    with torch.no_grad():
        head.weight.copy_(flat[:18].view(3, 6))
        head.bias.copy_(flat[18:])


@pytest.mark.parametrize("weight_decay", [1e-3, 0.1])
def test_lbfgs_finds_the_optimum(weight_decay: float, device: torch.device) -> None:
    features = make_features(200, 6)
    reference = nn.Linear(6, 3).double()
    minimise_by_newton(reference, features, weight_decay)
    for _ in range(2):
        head = nn.Linear(6, 3)
        nn.init.normal_(head.weight, std=3)
        result = fit_lbfgs(head, features, weight_decay=weight_decay, device=device)
        assert result.converged
        assert result.loss == pytest.approx(objective(reference, features, weight_decay).item(), abs=1e-6)
        torch.testing.assert_close(head.weight.double(), reference.weight, rtol=1e-3, atol=1e-3)
        objective(head, features, weight_decay).backward()
        assert head.weight.grad is not None
        assert head.bias.grad is not None
        largest = max(float(head.weight.grad.abs().max()), float(head.bias.grad.abs().max()))
        assert largest < 2e-5
        assert result.gradient == pytest.approx(largest, abs=1e-6)


def test_lbfgs_converges_on_wide_features_of_different_scales() -> None:
    """Features like those of pretrained networks: hundreds of columns, a few much larger than the rest."""
    features, targets = make_features(300, 256, noise=0.3).tensors
    columns = torch.logspace(-1, 1, 256)
    result = fit_lbfgs(nn.Linear(256, 3), TensorDataset(features * columns, targets), weight_decay=1e-2, device=CPU)
    assert result.converged
    assert result.iterations < 500


def test_lbfgs_in_chunks_equals_lbfgs_on_all_features() -> None:
    features = make_features(50)
    whole, chunked = nn.Linear(6, 3), nn.Linear(6, 3)
    chunked.load_state_dict(whole.state_dict())
    sizes: list[int] = []
    chunked.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    expected = fit_lbfgs(whole, features, weight_decay=0.01, device=CPU)
    result = fit_lbfgs(chunked, features, weight_decay=0.01, chunk_size=16, device=CPU)
    assert set(sizes) == {16, 2}
    assert result.loss == pytest.approx(expected.loss, abs=1e-6)
    torch.testing.assert_close(chunked.weight, whole.weight, rtol=1e-2, atol=1e-3)


def test_lbfgs_warns_if_it_has_not_converged() -> None:
    result = fit_lbfgs(nn.Linear(6, 3), make_features(200), weight_decay=0.01, max_iterations=2, device=CPU)
    assert result.iterations == 2
    assert not result.converged
    assert result.gradient > 1e-5


def test_lbfgs_raises_for_features_that_are_not_finite() -> None:
    data = TensorDataset(torch.full((4, 6), math.nan), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the objective is nan; the features or the classifier's weights are not"):
        fit_lbfgs(nn.Linear(6, 3), data, device=CPU)


def test_dropout_is_off_under_lbfgs() -> None:
    plain = nn.Linear(6, 3)
    dropping = nn.Sequential(nn.Dropout(0.5), copy.deepcopy(plain)).train()
    fit_lbfgs(plain, make_features(), weight_decay=0.1, device=CPU)
    assert fit_lbfgs(dropping, make_features(), weight_decay=0.1, device=CPU).converged
    assert torch.equal(dropping[1].weight, plain.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"epochs\n +Input should be greater than or equal to 1 .*input_value=0"),
        ({"batch_size": 0}, r"batch_size\n +Input should be greater than or equal to 1 .*input_value=0"),
        (
            {"validation": TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))},
            r"len\(validation\) = 0: expected one image or more",
        ),
        (
            {"train": TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))},
            r"len\(train\) = 0: expected one image or more",
        ),
    ],
)
def test_heads_raise_for_classifiers_that_cannot_train(settings: dict[str, Any], message: str) -> None:
    train = settings.pop("train", make_features())
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(6, 3), train, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_decay": -1.0}, r"weight_decay\n +Input should be greater than or equal to 0 .*input_value=-1\.0"),
        ({"weight_decay": math.nan}, r"weight_decay\n +Input should be a finite number .*input_value=nan"),
        ({"tolerance": -1e-5}, r"tolerance\n +Input should be greater than or equal to 0 .*input_value=-1e-05"),
        ({"max_iterations": 0}, r"max_iterations\n +Input should be greater than or equal to 1 .*input_value=0"),
        ({"chunk_size": 0}, r"chunk_size\n +Input should be greater than or equal to 1 .*input_value=0"),
        (
            {"features": TensorDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))},
            r"len\(features\) = 0: expected one image or more",
        ),
    ],
)
def test_lbfgs_raises_for_classifiers_that_cannot_train(settings: dict[str, Any], message: str) -> None:
    features = settings.pop("features", make_features())
    with pytest.raises(ValueError, match=message):
        fit_lbfgs(nn.Linear(6, 3), features, device=CPU, **settings)


def test_heads_run_on_the_device_of_the_classifier() -> None:
    head, data = nn.Linear(6, 3), make_features()
    settings: dict[str, Any] = {"learning_rates": [0.1], "epochs": 2, "batch_size": 8, "show_progress": False}
    with_device, without = copy.deepcopy(head), copy.deepcopy(head)
    fit_heads(with_device, data, data, device=CPU, **settings)
    fit_heads(without, data, data, **settings)
    torch.testing.assert_close(with_device.state_dict(), without.state_dict(), rtol=0, atol=0)
    fit_lbfgs(with_device, data, weight_decay=0.1, device=CPU)
    fit_lbfgs(without, data, weight_decay=0.1)
    torch.testing.assert_close(with_device.state_dict(), without.state_dict(), rtol=0, atol=0)


def test_unreadable_images_are_left_out() -> None:
    features, targets = make_features().tensors
    marked = TensorDataset(torch.cat([features, features[:5] * 1e3]), torch.cat([targets, torch.full((5,), IGNORED)]))
    whole = TensorDataset(features, targets)
    heads = [nn.Linear(6, 3) for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    results = [fit(head, data, validation=data) for head, data in zip(heads, (whole, marked), strict=True)]
    assert results[0] == results[1]
    ends = [fit_lbfgs(head, data, weight_decay=0.1) for head, data in zip(heads, (whole, marked), strict=True)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.arange(6), "target 3 is outside the 3 classes of the classifier"),
        (torch.arange(6) - 1, "target -1 is outside the 3 classes of the classifier"),
        (torch.rand(6), r"the targets are float32 of shape \(\) per image; pass class indices"),
        (torch.rand(6, 3), r"the targets are float32 of shape \(3,\) per image; pass class indices"),
    ],
)
def test_targets_that_are_not_classes_raise(targets: Tensor, message: str) -> None:
    data = TensorDataset(torch.eye(6), targets)
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(6, 3), data)
    with pytest.raises(ValueError, match=message):
        fit_lbfgs(nn.Linear(6, 3), data)


def test_other_datasets_raise() -> None:
    loader: Any = DataLoader(make_features(), 8)
    with pytest.raises(ValueError, match="train is a DataLoader; pass what extract_features returns"):
        fit(nn.Linear(6, 3), loader)
    with pytest.raises(ValueError, match="features is a DataLoader; pass what extract_features returns"):
        fit_lbfgs(nn.Linear(6, 3), loader)


def test_features_without_a_readable_image_raise() -> None:
    unread = TensorDataset(torch.eye(6), torch.full((6,), IGNORED))
    with pytest.raises(ValueError, match=r"len\(train\) = 0: expected one image or more"):
        fit(nn.Linear(6, 3), unread)


def test_rates_may_be_a_numpy_array() -> None:
    rates: Any = torch.tensor([0.125, 0.25])
    assert {result.lr for result in fit(nn.Linear(6, 3), make_features(), learning_rates=rates)} == {0.125, 0.25}
    with pytest.raises(ValueError, match=r"learning_rates\n +Input should be .*input_value=0\.1"):
        fit(nn.Linear(6, 3), make_features(), learning_rates=0.1)


def test_heads_get_all_tensors_of_a_backbone_output() -> None:
    class Named(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"image": images, "half": images / 2}

    class OnNamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return self.layer(features["half"])

    model = FineTuneModel(Named(), OnNamed())
    features = extract_features(model, DataLoader(make_features(), 8))  # type: ignore[arg-type]
    assert fit(model.classifier, features, validation=features)[0].validation_accuracy > 0.4
    assert fit_lbfgs(model.classifier, features, weight_decay=0.1).converged


class WithoutDoubles(TorchFunctionMode):
    """A device without float64, like MPS."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64 and result.device.type == "meta":
            raise TypeError("this device has no float64")
        return result


def test_learning_rates_are_not_computed_on_a_device_without_float64() -> None:
    with WithoutDoubles():
        heads = StackedHeads(nn.Linear(6, 3), RATES, device=torch.device("meta"))
    assert {rate.device.type for rate in heads.rates.values()} == {"meta"}
