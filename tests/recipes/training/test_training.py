"""Training: the same result on features and on images; frozen tensors do not change; trainable ones learn."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset
from unknown_rows import UnknownRows

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.features.cache import FeatureCache
from backbone_finetune.recipes.objectives.kinds import SingleLabel
from backbone_finetune.recipes.training.checkpoints import newest_checkpoint
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.epoch import DivergedError
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.scoring import evaluate

CPU = torch.device("cpu")
ACCELERATOR = make_accelerator(CPU)


class Counting(nn.Module):
    """A backbone with statistics and dropout that counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.last(self.stem(images))


def make_model(head: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(1)
    return FineTuneModel(Counting(), head or nn.Linear(16, 3)).freeze_backbone()


def make_images(count: int = 24) -> Any:
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(count) % 3
    images = torch.randn(count, 3, 8, 8, generator=generator) + torch.eye(3)[targets][:, :, None, None] * 2
    return TensorDataset(images, targets)


class Transformed(Dataset[tuple[Tensor, int]]):
    """Images with a deterministic transform that is not known to be deterministic."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.transform = Tensor.clone

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.data[index]
        return self.transform(image), int(target)


def run(
    model: FineTuneModel,
    train: Any = None,
    test: Any = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    accumulation: int = 1,
    device: torch.device = CPU,
    **phase: Any,
) -> list[Any]:
    """Train, and return the model to the CPU."""
    loop = TrainerConfig(
        ACCELERATOR if device == CPU else make_accelerator(device, mixed_precision="no"),
        batch_size=batch_size,
        seed=seed,
        accumulation=accumulation,
        autocast_features=False,  # compared up to rounding, so without bf16
        show_progress=False,
    )
    train, test = train or make_images(), test or make_images(12)
    history = fine_tune(model, train, test, [Phase(**{"epochs": 3, "lr": 1e-3, **phase})], loop)
    model.cpu()
    return history


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(module.state_dict()))


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_frozen_backbone_runs_once_for_each_image() -> None:
    model = make_model()
    run(model, epochs=5)
    assert model.backbone.seen == 24 + 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_on_features_equals_training_on_the_frozen_backbone(accumulation: int, device: torch.device) -> None:
    cached, whole = make_model(), make_model()
    history = run(cached, device=device)
    expected = run(whole, Transformed(make_images()), accumulation=accumulation, device=device)
    assert whole.backbone.seen == 3 * (24 + 12)
    # On CUDA, products in steps on images are in TF32, and Adam's steps are as large for small gradients.
    tolerance = {} if device == CPU else {"rtol": 0, "atol": 3e-3}
    torch.testing.assert_close(cached.classifier.state_dict(), whole.classifier.state_dict(), **tolerance)
    assert [result.validation_accuracy for result in history] == [result.validation_accuracy for result in expected]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_is_that_of_the_mean_loss(accumulation: int) -> None:
    """Checked at the gradient: AdamW's weights are the same for a sum and a mean."""
    model = FineTuneModel(nn.Flatten(), nn.Linear(4, 3))
    inputs, targets = torch.randn(7, 4), torch.arange(7) % 3
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(model(inputs), targets), [model.classifier.weight])
    parts: list[Tensor] = []
    model.classifier.weight.register_hook(lambda gradient: parts.append(gradient.clone()))
    data = TensorDataset(inputs, targets)
    run(model, data, data, epochs=1, accumulation=accumulation)
    assert len(parts) == accumulation
    torch.testing.assert_close(torch.stack(parts).sum(0), expected)


def test_a_scaled_loss_does_not_change_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler of fp16, which needs CUDA; a power of two scales without rounding."""
    scaled, plain, gradients = make_model(), make_model(), []
    scaled.classifier.weight.register_hook(lambda gradient: gradients.append(gradient.abs().max().item()))
    run(plain, epochs=1)
    monkeypatch.setattr(ACCELERATOR, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    run(scaled, epochs=1)
    torch.testing.assert_close(tensors(scaled), tensors(plain), rtol=0, atol=0)
    assert min(gradients) > 1_000


def test_each_step_takes_the_gradient_of_its_own_batch() -> None:
    """With one batch per epoch, the order has no effect: AdamW by hand gives the same weights."""
    torch.manual_seed(3)
    model = FineTuneModel(nn.Flatten(), nn.Linear(4, 3))
    head = copy.deepcopy(model.classifier)
    inputs, targets = torch.randn(7, 4), torch.arange(7) % 3
    optimizer = torch.optim.AdamW(
        [{"params": [head.weight], "weight_decay": 0.1}, {"params": [head.bias], "weight_decay": 0.0}], lr=0.05
    )
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(inputs), targets).backward()
        optimizer.step()
    data = TensorDataset(inputs, targets)
    run(model, data, data, batch_size=7, accumulation=3, lr=0.05, weight_decay=0.1)
    torch.testing.assert_close(model.classifier.state_dict(), head.state_dict())


def test_frozen_means_frozen_and_the_classifier_learns(device: torch.device) -> None:
    model = make_model()
    before = tensors(model)
    history = run(model, epochs=40, lr=0.05, device=device)
    assert changed(before, model) == {"classifier.weight", "classifier.bias"}
    assert history[-1].train_loss < 0.7 * history[0].train_loss
    assert (history[-1].validation_accuracy or 0) > 0.8
    assert [result.epoch for result in history] == list(range(1, 41))


def test_a_trainable_group_trains_with_its_statistics_and_the_others_do_not(device: torch.device) -> None:
    model = make_model()
    before = tensors(model)
    run(model, trainable_groups=1, norm_eval=False, device=device)
    moved = changed(before, model)
    assert {name for name in moved if name.startswith("backbone.stem")} == set()
    assert {"backbone.last.0.weight", "backbone.last.1.running_mean", "classifier.weight"} <= moved


def test_running_statistics_are_fixed_unless_a_phase_trains_them(device: torch.device) -> None:
    model = make_model()
    before = tensors(model)
    run(model, trainable_groups=1, device=device)
    moved = changed(before, model)
    assert "backbone.last.0.weight" in moved
    assert not any("running" in name for name in moved)


def test_each_part_has_its_own_learning_rate() -> None:
    slow = make_model()
    before = tensors(slow)
    run(slow, trainable_groups=1, backbone_lr=1e-9, weight_decay=0.0)
    distance = {name: float((tensor - before[name]).abs().max()) for name, tensor in slow.state_dict().items()}
    assert distance["backbone.last.0.weight"] < 1e-6 < distance["classifier.weight"]


def test_a_changed_frozen_tensor_raises(device: torch.device) -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, images: Tensor) -> Tensor:
            self.weight.data += 1
            return images.mean((2, 3)) * self.weight

    model = FineTuneModel(Drifting(), nn.Linear(3, 3)).freeze_backbone()
    with pytest.raises(AssertionError, match=r"backbone\.weight"):
        run(model, device=device)


def test_dropout_masks_differ_in_every_step_and_are_off_in_evaluation() -> None:
    class Recording(nn.Dropout):
        outputs: list[tuple[bool, Tensor]]

        def forward(self, features: Tensor) -> Tensor:
            output = super().forward(features)
            self.outputs.append((self.training, output == 0))
            return output

    dropout = Recording(0.5)
    dropout.outputs = []
    run(make_model(nn.Sequential(dropout, nn.Linear(16, 3))), epochs=2, batch_size=24)
    training = [zeros for training, zeros in dropout.outputs if training]
    evaluation = [zeros for training, zeros in dropout.outputs if not training]
    assert len(training) == 2
    assert not torch.equal(*training)
    assert 0.3 < training[0].float().mean() < 0.7
    assert not any(zeros.any() for zeros in evaluation)


@pytest.mark.parametrize("trainable_groups", [0, 1])
def test_weights_depend_on_the_seed(trainable_groups: int) -> None:
    def weights(seed: int) -> Tensor:
        model = make_model()
        run(model, seed=seed, trainable_groups=trainable_groups)
        return model.classifier.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_the_validation_images_do_not_affect_training() -> None:
    def weights(validation: Any) -> Tensor:
        model = make_model()
        run(model, make_images(), validation, epochs=2, trainable_groups=1)
        return model.classifier.weight

    assert torch.equal(weights(make_images(12)), weights(TensorDataset(torch.ones(2, 3, 8, 8), torch.tensor([0, 1]))))


def test_a_last_batch_of_one_image_works_with_batch_norm() -> None:
    head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))
    history = run(make_model(head), make_images(17), make_images(3), epochs=1)
    assert len(history) == 1


def test_accuracy_is_the_share_of_correct_predictions() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [5.0, 4.0]])
    data = TensorDataset(logits, torch.tensor([0, 1, 1, 0]))
    module = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
    score = evaluate(module, data, TrainerConfig(ACCELERATOR, batch_size=3))
    assert (score.accuracy, score.balanced_accuracy) == (0.75, (1 + 1 / 2) / 2)


def test_what_cannot_be_read_does_not_count() -> None:
    logits = torch.eye(4)[[0, 0, 2, 2]]
    data = TensorDataset(logits, torch.tensor([0, IGNORED, 2, 1]))
    score = evaluate(nn.Identity(), data, TrainerConfig(ACCELERATOR, batch_size=2))
    assert (score.accuracy, score.balanced_accuracy) == (2 / 3, (1 + 1 + 0) / 3)
    assert (score.answers.tolist(), score.targets.tolist()) == ([0, 2, 2], [0, 2, 1])
    with pytest.raises(ValueError, match="data: none of the images can be read"):
        evaluate(nn.Identity(), TensorDataset(logits[:1], torch.tensor([IGNORED])), TrainerConfig(ACCELERATOR))


@pytest.mark.parametrize("target", [4, -1])
def test_a_target_outside_the_classes_is_not_evaluated(target: int) -> None:
    class Own(Subset[Any]):
        """A dataset whose targets nobody knows before they are loaded."""

    images = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, target]))
    for data in (images, Own(images, range(4))):
        with pytest.raises(ValueError, match=f"target {target} is outside the 4 classes"):
            evaluate(nn.Identity(), data, TrainerConfig(ACCELERATOR, batch_size=2))


def test_progress_is_shown_for_each_epoch(capfd: pytest.CaptureFixture[str]) -> None:
    phases = [Phase(epochs=1), Phase(epochs=1, trainable_groups=1)]
    fine_tune(make_model(), make_images(), make_images(12), phases, TrainerConfig(ACCELERATOR, batch_size=8))
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    for epoch in (1, 2):
        assert any(line.startswith(f"epoch {epoch}/2: 100%") and "validation=" in line for line in lines)


def test_each_phase_continues_from_the_one_before_and_trains_its_own_layers() -> None:
    model, first = make_model(), make_model()
    head, last, again = (
        Phase(epochs=2, lr=0.01),
        Phase(epochs=1, trainable_groups=1, lr=0.01),
        Phase(epochs=1, lr=0.01),
    )
    fine_tune(
        first, make_images(), make_images(12), [head], TrainerConfig(ACCELERATOR, batch_size=8, show_progress=False)
    )
    before = tensors(model)
    states: list[dict[str, Tensor]] = []

    def capture(module: nn.Module, inputs: object) -> None:
        if not states:  # the first forward of the whole model is in the second phase
            states.append(tensors(module))

    hook = model.register_forward_pre_hook(capture)
    history = fine_tune(
        model, make_images(), make_images(12), [head, last, again], TrainerConfig(ACCELERATOR, batch_size=8)
    )
    hook.remove()
    assert [result.epoch for result in history] == [1, 2, 3, 4]
    assert changed(states[0], first) == set()
    assert {name for name in changed(before, model) if name.startswith("backbone.stem")} == set()
    assert "backbone.last.0.weight" in changed(before, model)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())


def test_features_of_an_earlier_backbone_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "backbone_finetune")
    phases = [Phase(epochs=1), Phase(epochs=1, trainable_groups=1), Phase(epochs=1)]
    caches = (FeatureCache(tmp_path / "train", "these"), FeatureCache(tmp_path / "test", "those"))
    loop = TrainerConfig(ACCELERATOR, caches=caches, show_progress=False)
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16))
    model = FineTuneModel(nn.Sequential(nn.Conv2d(3, 8, 3), last), nn.Linear(16, 3))
    passes: list[None] = []
    model.backbone.register_forward_hook(lambda *_: passes.append(None))
    fine_tune(model, make_images(), make_images(12), phases, loop)
    # Another phase needs other tensors: nothing is wrong with those that are stored.
    assert not any(message.startswith("features in") for message in caplog.messages)
    passes.clear()
    fine_tune(model, make_images(), make_images(12), [Phase(epochs=1)], loop)
    assert len(passes) == 2  # the stored features are those of the final backbone; eight images are checked


@pytest.mark.long
def test_mixed_precision_does_not_change_the_model() -> None:
    code = """if True:
        import torch
        from test_training import make_model, make_images, Phase, TrainerConfig, fine_tune
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(True)
        from backbone_finetune.recipes.training.processes import make_accelerator
        accelerator = make_accelerator(torch.device("cpu"), mixed_precision="bf16")
        model = make_model()
        seen = []
        model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        phases = [Phase(epochs=1), Phase(epochs=1, trainable_groups=1)]
        fine_tune(model, make_images(), make_images(3), phases, TrainerConfig(accelerator, show_progress=False))
        assert torch.bfloat16 in seen, seen
        seen.clear()
        assert model(make_images(3).tensors[0]).dtype == torch.float32
        assert seen == [torch.float32]
        assert "forward" not in vars(model) and "forward" not in vars(model.classifier)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize("name", ["batch_size", "accumulation", "checkpoint_steps", "views"])
def test_a_config_value_out_of_range_raises(name: str) -> None:
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"{name}\n +Input should be .*input_value={value}"):
            TrainerConfig(ACCELERATOR, **{name: value})
    with pytest.raises(ValueError, match=r"seed\n +Input should be greater than or equal to 0 .*input_value=-1"):
        TrainerConfig(ACCELERATOR, seed=-1)


def test_no_phases_and_no_images_raise() -> None:
    none: Any = TensorDataset(torch.zeros(0, 3, 8, 8), torch.zeros(0))
    with pytest.raises(ValueError, match="phases is empty; pass one Phase or more"):
        fine_tune(make_model(), make_images(), make_images(), [], TrainerConfig(ACCELERATOR))
    for data, name in ((none, "train"), (make_images(), "validation")):
        with pytest.raises(ValueError, match=rf"len\({name}\) = 0: expected one image or more"):
            fine_tune(make_model(), data, none, [Phase()], TrainerConfig(ACCELERATOR))


def one_batch() -> Any:
    return make_images(8)


@pytest.mark.parametrize(
    ("images", "phase", "epoch", "said"),
    [
        (TensorDataset(one_batch().tensors[0] * torch.nan, one_batch().tensors[1]), {}, 1, "the loss became nan"),
        # One step per epoch: AdamW's first step gives weights of 10 times lr, which the decay multiplies by lr.
        (one_batch(), {"lr": 1e37}, 2, ".* became (nan|inf|infinite or nan)"),
        (make_images(), {"lr": 1e37}, 1, ".* became (nan|inf|infinite or nan)"),  # between two of its checkpoints
        (one_batch(), {"lr": 1e38}, 1, "a weight or a running statistic became infinite or nan"),
        # If a variance overflows, all outputs are 0, and the loss is constant.
        (
            TensorDataset(one_batch().tensors[0] * 1e25, one_batch().tensors[1]),
            {"trainable_groups": 1, "norm_eval": False},
            1,
            "a weight or a running statistic became infinite or nan",
        ),
    ],
)
def test_a_training_that_diverges_raises_with_the_epoch(
    tmp_path: Path, images: Any, phase: dict[str, Any], epoch: int, said: str
) -> None:
    loop = TrainerConfig(ACCELERATOR, batch_size=8, checkpoints=tmp_path, checkpoint_steps=1, show_progress=False)
    for _ in range(2):  # the second time from the last checkpoint
        model = make_model()
        with pytest.raises(
            DivergedError,
            match=rf"^the training diverged at lr = .*: {said} in epoch {epoch}; pass a lower --lr \(in Python",
        ):
            fine_tune(model, images, make_images(12), [Phase(**{"epochs": 3, **phase})], loop)
        saved = newest_checkpoint(tmp_path)
        assert saved is None or len(saved.progress.history) == epoch - 1
        assert saved is None or all(tensor.isfinite().all() for tensor in saved.model.values())
        assert not ACCELERATOR._models
        assert "_is_accelerate_prepared" not in vars(model) | vars(model.classifier)


class Masked(nn.Module):
    """A module with an infinite mask in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs @ self.mask.softmax(-1))


def test_values_that_were_infinite_before_training_are_not_divergence() -> None:
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    model = FineTuneModel(Masked(), nn.Linear(4, 2))
    loop = TrainerConfig(ACCELERATOR, batch_size=4, show_progress=False)
    assert len(fine_tune(model, data, data, [Phase(epochs=1, trainable_groups=1)], loop)) == 1
    with pytest.raises(DivergedError):
        fine_tune(model, data, data, [Phase(epochs=1, trainable_groups=1, lr=1e38, backbone_lr=1e38)], loop)


def test_a_loss_that_is_not_finite_raises() -> None:
    model = make_model()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([3e38, -3e38, -3e38]))
    with pytest.raises(DivergedError, match="the loss became inf in epoch 1"):
        run(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("cached", [True, False])
def test_a_copy_of_what_trains_is_prepared_for_fsdp2(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 would shard the user's model. A copy trains, and meanwhile the model is not on the device."""
    places: list[Any] = []

    class Recorded(Counting):
        def __getstate__(self) -> Any:
            assert not cached, "features are computed: the backbone need not be copied"
            return vars(self).copy()

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            places.append(fn)
            return super()._apply(fn, recurse)

    def train() -> FineTuneModel:
        torch.manual_seed(1)
        model = FineTuneModel(Recorded(), nn.Linear(16, 3))
        config = TrainerConfig(ACCELERATOR, cache_features=cached, show_progress=False, autocast_features=False)
        fine_tune(model, make_images(), None, [Phase(epochs=2, lr=0.01)], config)
        return model

    def prepare(module: nn.Module, optimizer: Any) -> Any:
        prepared.append(module)
        return module, SimpleNamespace(optimizer=optimizer)

    expected, prepared = tensors(train()), list[nn.Module]()
    monkeypatch.setattr(type(ACCELERATOR), "is_fsdp2", property(lambda accelerator: True))
    monkeypatch.setattr(ACCELERATOR.state, "fsdp_plugin", SimpleNamespace(), raising=False)
    monkeypatch.setattr(ACCELERATOR, "prepare", prepare)
    places.clear()
    model = train()
    assert changed(expected, model) == set()
    assert len(prepared) == 1
    assert prepared[0] not in {model, model.classifier}
    assert cached or len(places) == 3  # to the device, and while a copy trains, to the CPU and back


@pytest.mark.parametrize("as_list", [False, True])
def test_torch_set_default_device_has_no_effect(as_list: bool) -> None:
    """The recipes create tensors with an explicit device; a tensor on "meta" has no values and would raise."""
    results = []
    for default in ("cpu", "meta"):
        model, data = make_model(), make_images()
        images = [(image, int(target)) for image, target in data] if as_list else data
        config = TrainerConfig(
            ACCELERATOR, batch_size=8, objective=SingleLabel((1.0, 2.0, 1.0)), show_progress=False, workers=0
        )
        with torch.device(default):
            results.append(
                fine_tune(model, images, images, [Phase(epochs=1), Phase(epochs=1, trainable_groups=2)], config)
            )
    assert results[0] == results[1]


def replaced(row: int, target: float) -> list[Any]:
    rows = [(image, int(number)) for image, number in make_images(12)]
    rows[row] = (rows[row][0], target)
    return rows


@pytest.mark.parametrize("faulty", ["train", "validation"])
@pytest.mark.parametrize(
    ("cached", "target", "message"),
    [
        (True, 3, "target 3 is outside the 3 classes of the classifier"),
        (False, 3, "target 3 is outside the 3 classes of the classifier"),
        (False, -1, "target -1 is outside the 3 classes"),
        (False, 0.7, "the targets are float32 of shape"),
    ],
)
def test_a_wrong_target_in_a_later_row_is_named(faulty: str, cached: bool, target: float, message: str) -> None:
    data: dict[str, Any] = {"train": make_images(), "validation": make_images(12), faulty: replaced(9, target)}
    if not cached:
        data[faulty] = UnknownRows(data[faulty])
    with pytest.raises(ValueError, match=f"^{faulty}: {message}"):
        run(make_model(), data["train"], data["validation"], epochs=1)


@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda image, target: (image, image, target),
            r"first row's input, \(3, 8, 8\) float32, .* positional arguments",
        ),
        (lambda image, target: (image.mul(255).byte(), target), r"first row's input, \(3, 8, 8\) uint8 \(.*float32"),
        (lambda image, target: (image[:1], target), r"first row's input, \(1, 8, 8\) float32 .*3 channels"),
        (lambda image, target: (Image.new("RGB", (8, 8)), target), r"\(Image, int\); .* give the dataset a transform"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_described(
    change: Any, message: str, cached: bool, groups: int
) -> None:
    rows = [change(image, int(target)) for image, target in make_images(12)]
    with pytest.raises(ValueError, match=f"^train.*{message}"):
        run(make_model(), rows if cached else UnknownRows(rows), make_images(12), epochs=1, trainable_groups=groups)


def test_one_image_is_too_few_for_statistics_that_move() -> None:
    model = make_model(nn.Sequential(nn.Linear(16, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"^a batch of one image: .*; pass more images, a larger"):
        run(model, make_images(1), make_images(12), epochs=1)


def test_an_error_that_the_first_row_does_not_explain_stays() -> None:
    rows = [*make_images(11), (torch.ones(3, 9, 9), 0)]
    with pytest.raises(RuntimeError, match="equal size"):
        run(make_model(), UnknownRows(rows), epochs=1)
