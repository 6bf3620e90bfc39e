"""Augmented and mixed images: bit for bit the same with any number of workers and after resuming; errors; the log."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from image_folders import make_folder
from steps import StoppedError, after_step
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel, cli
from backbone_finetune.recipes import (
    Augmentation,
    FeatureCache,
    ImageDataset,
    MultiLabel,
    Phase,
    Regression,
    SingleLabel,
    SoftLabels,
    TrainerConfig,
    cross_validate,
    find_images,
    fine_tune,
    load_trained_model,
    make_accelerator,
    read_phases,
)
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.training.mixing import make_mixing

CONFIG: dict[str, Any] = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
RATES: dict[str, Any] = {"trainable_groups": 1, "lr": 0.01, "backbone_lr": 0.01}
STRONG = Phase(epochs=2, augment=Augmentation.STRONG, mixup=0.4, cutmix=1.0, **RATES)


def make_images(root: Path) -> ImageDataset:
    folder = find_images(make_folder(root))
    return ImageDataset(folder, create_transform(**CONFIG), augment=lambda drawn: drawn.make_transform(CONFIG))


def make_model() -> FineTuneModel:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
    last = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return FineTuneModel(nn.Sequential(stem, last), nn.Linear(8, 3))


def train(data: Any, *phases: Phase, **settings: Any) -> tuple[dict[str, Tensor], list[Any]]:
    model = make_model()
    given = {"batch_size": 4, "show_progress": False, "workers": 0, **settings}
    history = fine_tune(model, data, None, phases, TrainerConfig(make_accelerator(torch.device("cpu")), **given))
    return model.state_dict(), history


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_what_is_drawn_does_not_depend_on_workers_and_parts(tmp_path: Path) -> None:
    data = make_images(tmp_path)
    alone, history = train(data, STRONG)
    with_workers, again = train(data, STRONG, workers=2)
    assert_same(alone, with_workers)
    assert history == again
    for other in (Phase(epochs=2, **RATES), Phase(epochs=2, augment=Augmentation.STRONG, **RATES)):
        assert train(data, other)[1] != history
    assert train(data, STRONG, seed=1)[1] != history
    parts, _ = train(data, STRONG, accumulation=2)  # mixed before the batch is divided
    torch.testing.assert_close(parts, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_resumed_run_draws_the_same(stop: int, tmp_path: Path) -> None:
    data = make_images(tmp_path / "images")
    whole, history = train(data, STRONG)
    settings = {"checkpoints": tmp_path / "checkpoints", "checkpoint_steps": 1}
    with after_step(stop), pytest.raises(StoppedError):
        train(data, STRONG, **settings)
    resumed, again = train(data, STRONG, **settings)
    assert_same(whole, resumed)
    assert history == again


def test_each_phase_has_its_own_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_images(tmp_path / "images")
    shown: list[Any] = []
    data.augment = lambda drawn: (shown.append(drawn), drawn.make_transform(CONFIG))[1]  # type: ignore[func-returns-value]
    caches = (FeatureCache(tmp_path / "train", "these"), FeatureCache(tmp_path / "test", "those"))
    phases = (Phase(epochs=2, lr=0.01), Phase(epochs=2, augment=Augmentation.LIGHT, **RATES))
    with caplog.at_level(logging.WARNING):
        train(data, phases[0], Phase(epochs=1, **RATES))
        assert not shown
        assert not caplog.messages
        fresh, _ = train(data, *phases)
    assert shown == [Augmentation.LIGHT]
    assert [message for message in caplog.messages if "--views K" in message and "--augment none" in message]
    caplog.clear()
    cached, _ = train(data, *phases, views=2, caches=caches)
    assert not caplog.messages
    assert not torch.equal(fresh["classifier.weight"], cached["classifier.weight"])
    strong = (phases[0], Phase(epochs=2, augment=Augmentation.STRONG, **RATES))
    assert_same(train(data, *strong, views=2, caches=caches)[0], train(data, *strong, views=2)[0])


def test_each_step_is_mixed_with_another_seed() -> None:
    shares: list[float] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        shares.append(float(targets.max()))
        return cross_entropy(outputs, targets, reduction="none")

    model = FineTuneModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(8, 18))
    images = TensorDataset(torch.randn(18, 3, 8, 8), torch.eye(18))
    config = TrainerConfig(
        make_accelerator(torch.device("cpu")), batch_size=4, objective=SoftLabels(loss=loss), show_progress=False
    )
    fine_tune(model, images, None, [Phase(epochs=2, mixup=1.0, **RATES)], config)
    assert len(shares) == len(set(shares)) == 2 * 5


def test_augmented_images_that_cannot_be_read_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make_images(tmp_path)
    data.folder.paths[2].write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        train(data, Phase(epochs=1, augment=Augmentation.LIGHT, **RATES))
    assert list(data.broken) == [str(data.folder.paths[2])]
    assert sum("2.png: not a readable image" in message for message in caplog.messages) == 1


def test_folds_of_augmented_views_are_evaluated_on_the_images_themselves(tmp_path: Path) -> None:
    data = make_images(tmp_path)
    phases = [Phase(epochs=1, augment=Augmentation(scale=(0.1, 0.2)), lr=0.01)]
    config = TrainerConfig(make_accelerator(torch.device("cpu")), batch_size=4, views=2, show_progress=False)
    own = cross_validate(make_model(), data, phases, config, folds=3)
    assert own == cross_validate(make_model(), data, phases, config, folds=3, evaluated=make_images(tmp_path))


def test_a_pair_is_mixed_as_timm_mixes_it() -> None:
    images, targets = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    mixing = make_mixing(Phase(mixup=0.4, cutmix=1.0), SingleLabel(label_smoothing=0.1), 3)
    assert mixing is not None
    state = numpy.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    mixed, rows = mixing.mix((images.clone(), targets), seed="0 1 0 mix")
    assert numpy.random.get_state()[1].tolist() == state  # type: ignore[index,union-attr]
    numpy.random.seed(random.Random("0 1 0 mix").getrandbits(63) % 2**32)
    expected = Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=3)(images.clone(), targets)  # type: ignore[no-untyped-call]
    assert torch.equal(mixed, expected[0])
    assert torch.equal(rows, expected[1])
    assert isinstance(mixing.objective, SoftLabels)


def test_the_last_image_of_an_odd_batch_and_unreadable_images() -> None:
    mixing = make_mixing(Phase(mixup=0.4), SingleLabel(), 3)
    assert mixing is not None
    images = torch.rand(5, 3, 8, 8)
    mixed, rows = mixing.mix((images.clone(), torch.tensor([0, IGNORED, 2, 1, 2])), seed="0")
    assert torch.equal(mixed[4], images[4])
    assert rows[4].tolist() == [0, 0, 1]
    assert rows.isnan().all(1).tolist() == [False, True, True, False, False]  # both of the pair 1 and 2
    alone, row = mixing.mix((images[:1].clone(), torch.tensor([1])), seed="0")
    assert torch.equal(alone, images[:1])
    assert row.tolist() == [[0, 1, 0]]


MIXED = "mixup and CutMix mix the images of each step"


def test_views_are_not_cached_where_images_are_mixed(tmp_path: Path) -> None:
    data = make_images(tmp_path)
    _, history = train(data, STRONG, views=2)
    assert [result.why_uncached for result in history] == [MIXED] * len(history)
    whole = train(data, STRONG, views=2, cache_features=False)[1]
    assert history == [replace(result, why_uncached=MIXED) for result in whole]


def test_labels_are_mixed() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).repeat(4, 1)
    data = TensorDataset(torch.rand(8, 3, 16, 16), targets)
    phase = Phase(epochs=1, mixup=1.0, **RATES)
    _, history = train(data, phase, objective=MultiLabel())
    whole = train(data, phase, objective=MultiLabel(), cache_features=False)[1]
    assert history == [replace(result, why_uncached=MIXED) for result in whole]  # images, not cached tensors
    mixing = make_mixing(Phase(mixup=1.0), MultiLabel(), 3)
    assert mixing is not None
    rows = mixing.mix((torch.rand(8, 3, 4, 4), targets), seed="1")[1]
    assert rows[:, 2].tolist() == pytest.approx([1] * 8)
    assert ((rows[:, 0] > 0) & (rows[:, 0] < 1)).all()


@pytest.mark.parametrize(
    "objective",
    [Regression(), SingleLabel(class_weights=(1, 2, 3)), SingleLabel(loss=lambda outputs, targets: outputs.sum(1))],
)
def test_targets_that_cannot_be_mixed_are_refused(objective: Any) -> None:
    data = TensorDataset(
        torch.rand(4, 3, 16, 16), torch.rand(4, 3) if objective == Regression() else torch.arange(4) % 3
    )
    with pytest.raises(ValueError, match=r"mixup and cutmix .*work with SingleLabel\(\) without .*pass mixup=0"):
        train(data, Phase(mixup=0.2, lr=0.01), objective=objective)


def test_images_that_cannot_be_mixed_or_augmented_are_refused(tmp_path: Path) -> None:
    mixing = make_mixing(Phase(mixup=0.2), SingleLabel(), 3)
    assert mixing is not None
    with pytest.raises(
        ValueError, match=r"float images \(B, C, H, W\); the dataset gives torch.float32 of shape \(4, 5\)"
    ):
        mixing.mix((torch.rand(4, 5), torch.zeros(4)), seed="0")
    data = TensorDataset(torch.rand(4, 3, 16, 16), torch.arange(4) % 3)
    with pytest.raises(ValueError, match="the training data is a TensorDataset; pass an ImageDataset, or"):
        train(data, Phase(augment=Augmentation.LIGHT, lr=0.01))
    folder = find_images(make_folder(tmp_path))
    with pytest.raises(ValueError, match=r"no transform for Phase\(augment=...\); pass ImageDataset\("):
        train(ImageDataset(folder, create_transform(**CONFIG)), Phase(augment=Augmentation.LIGHT, lr=0.01))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_augment": "randy"}, "auto_augment = 'randy' is no policy of timm"),
        ({"auto_augment": "rand-q9"}, "auto_augment = 'rand-q9' is no policy of timm"),
        ({"scale": (0.9, 0.1)}, r"scale = \(0.9, 0.1\): expected the smallest area first"),
        ({"re_prob": 2}, "less than or equal to 1"),
    ],
)
def test_invalid_augmentations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_augmentations_in_a_file_of_phases(tmp_path: Path) -> None:
    path = tmp_path / "phases.toml"
    path.write_text(
        '[[phases]]\naugment = "none"\n\n[[phases]]\naugment = "strong"\nmixup = 0.2\nnorm_eval = false\n\n'
        "[[phases]]\n[phases.augment]\nscale = [0.5, 1.0]\nvflip = 0.5\n"
    )
    assert read_phases(path) == (
        Phase(),
        Phase(augment=Augmentation.STRONG, mixup=0.2, norm_eval=False),
        Phase(augment=Augmentation(scale=(0.5, 1.0), vflip=0.5)),
    )
    path.write_text('[[phases]]\naugment = "heavy"\n')
    with pytest.raises(ValueError, match="augment = 'heavy': expected none, light, strong, or a table"):
        read_phases(path)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Any]:
    make_folder(tmp_path / "images")

    def run(name: str, *options: str) -> Any:
        output = tmp_path / name
        fixed = ("--model", "test_resnet", "--input-size", "32", "--batch-size", "8", "--lr", "0.01", "--device", "cpu")
        assert cli.main(["train", str(tmp_path / "images"), *fixed, *options, "--output", str(output)]) == 0
        return load_trained_model(output / "model.safetensors").model.state_dict()

    return run


def test_the_command_augments(command: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--epochs", "1", "--trainable-groups", "1")
    plain = command("plain", *options)
    assert "not cached" not in capsys.readouterr().err
    assert_same(plain, command("none", *options, "--augment", "none"))
    light = command("light", *options, "--augment", "light", "--mixup", "0.2")
    assert not torch.equal(plain["classifier.weight"], light["classifier.weight"])
    assert "features are not cached" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "light" / "run.json").read_text())["arguments"]["phases"]
    assert recorded == [json.loads(json.dumps(asdict(Phase(1, 1, lr=0.01, augment=Augmentation.LIGHT, mixup=0.2))))]
    again = tmp_path / "again"
    assert cli.main(["train", "--run", str(tmp_path / "light" / "run.json"), "--output", str(again)]) == 0
    assert_same(light, load_trained_model(again / "model.safetensors").model.state_dict())
    capsys.readouterr()
    assert cli.main(["train", "--augment", "none", "--views", "2", "--output", str(tmp_path / "error")]) == 2
    assert "--augment none and --views 2 were both given" in capsys.readouterr().err
