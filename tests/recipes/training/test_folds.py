"""Cross-validation: each image is held out once, frozen modules run once, and folds train separately."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from image_folders import make_folder
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils._pytree import tree_structure
from torch.utils.data import Subset, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.data.images import ImageDataset
from backbone_finetune.recipes.data.sources.finding import find_images
from backbone_finetune.recipes.features.cache import FeatureCache
from backbone_finetune.recipes.features.dataset import Features
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.folds import cross_predict, cross_validate, split_folds
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phase_data import Fold
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.scoring import evaluate

ACCELERATOR = Accelerator(cpu=True)
HEAD = Phase(epochs=2, lr=0.05)
BOTH = Phase(epochs=2, trainable_groups=1, lr=0.05, backbone_lr=0.05)


class Stem(nn.Module):
    """A first layer that counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)
        self.seen = Counter[str]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen["images"] += len(inputs)
        return self.layer(inputs).relu()

    def __deepcopy__(self, memo: Any) -> "Stem":
        stem = Stem()
        stem.load_state_dict(self.state_dict())
        stem.seen = self.seen  # copies share the count
        return stem


def make_model() -> FineTuneModel:
    torch.manual_seed(0)
    return FineTuneModel(nn.Sequential(Stem(), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))), nn.Linear(8, 3))


def make_data(count: int = 60) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    return TensorDataset(torch.eye(3)[targets] + torch.randn(count, 3, generator=generator), targets)


def config(**settings: Any) -> TrainerConfig:
    return TrainerConfig(ACCELERATOR, batch_size=8, autocast_features=False, show_progress=False, **settings)


@pytest.mark.parametrize("phases", [[HEAD], [HEAD, BOTH]])
def test_frozen_modules_run_once_for_all_folds(phases: list[Phase]) -> None:
    model = make_model()
    stem: Any = model.backbone[0]
    cross_validate(model, make_data(600), phases, config(workers=0), folds=5)
    passes = stem.seen["images"] / 600  # by themselves, five trainings would make five of each phase
    # Each fold finds a frontier and checks it on one batch.
    assert 1 <= passes < 1.1 if len(phases) == 1 else 2 <= passes < 3


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("phases", [[HEAD], [HEAD, BOTH], [Phase(epochs=2)]])
def test_a_fold_equals_training_on_the_other_folds(phases: list[Phase], cached: bool) -> None:
    data = make_data()
    histories = cross_validate(make_model(), data, phases, config(cache_features=cached), folds=3)
    assert len(histories) == 3
    for part, history in zip(split_folds(data, 3, seed=0), histories, strict=True):
        rest = [index for index in range(60) if index not in part]
        expected = fine_tune(
            make_model(), Subset(data, rest), Subset(data, part), phases, config(cache_features=cached)
        )
        for one, other in zip(history, expected, strict=True):
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
            assert one.validation_accuracy == other.validation_accuracy


@pytest.mark.parametrize("phases", [[HEAD], [HEAD, BOTH]])
@pytest.mark.parametrize("cached", [True, False])
def test_each_image_is_predicted_by_a_model_that_trained_on_the_other_folds(phases: list[Phase], cached: bool) -> None:
    data, settings = make_data(), config(cache_features=cached)
    predicted = cross_predict(make_model(), data, phases, settings, folds=3)
    for part in split_folds(data, 3, seed=0):
        rest = [index for index in range(60) if index not in part]
        fine_tune(model := make_model(), Subset(data, rest), None, phases, settings)
        expected = evaluate(model, Subset(data, part), settings, keep_outputs=True).outputs
        assert expected is not None
        torch.testing.assert_close(predicted[part], expected.softmax(1), rtol=1e-4, atol=1e-5)


def test_a_prediction_needs_no_other_pass_of_the_frozen_modules(tmp_path: Path) -> None:
    model = make_model()
    stem: Any = model.backbone[0]
    predicted = cross_predict(model, make_data(200), [HEAD], config(workers=0), folds=3)
    assert stem.seen["images"] / 200 < 1.1
    caches = FeatureCache(tmp_path / "train", "these images"), FeatureCache(tmp_path / "validation", "none")
    fine_tune(make_model(), make_data(200), None, [HEAD], config(workers=0, caches=caches))
    model = make_model()
    seen: Any = model.backbone[0]
    again = cross_predict(model, make_data(200), [HEAD], config(workers=0, caches=caches), folds=3)
    assert seen.seen["images"] / 200 < 0.1  # a few are compared with the cached rows
    torch.testing.assert_close(again, predicted, rtol=1e-4, atol=1e-5)


def test_an_unreadable_image_has_no_prediction(tmp_path: Path) -> None:
    (make_folder(tmp_path) / "green" / "3.png").write_bytes(b"no image")
    found = find_images(tmp_path)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = FineTuneModel(backbone, nn.Linear(4, 3))
    for views in (1, 2):
        shown, plain = (ImageDataset(found, create_transform(32, is_training=drawn)) for drawn in (views > 1, False))
        data = {"data": plain} if views == 1 else {"data": shown, "evaluated": plain}
        predicted = cross_predict(model, phases=[HEAD], config=config(views=views), folds=3, **data)
        is_broken = torch.tensor([path.parts[-2:] == ("green", "3.png") for path in found.paths])
        assert torch.equal(predicted.isnan().all(1), is_broken)
        torch.testing.assert_close(predicted[~is_broken].sum(1), torch.ones(17))


def test_each_image_is_held_out_once_and_each_fold_has_all_classes() -> None:
    parts = split_folds(make_data(), 4, seed=0)
    assert sorted(index for part in parts for index in part) == list(range(60))
    assert all(Counter(index % 3 for index in part) == {0: 5, 1: 5, 2: 5} for part in parts)
    assert parts != split_folds(make_data(), 4, seed=1)


def test_nothing_is_chosen_on_the_held_out_fold() -> None:
    asked: list[int] = []

    def monitor(result: Any) -> float:
        asked.append(result.epoch)
        return 0.0

    model = make_model()
    before = copy.deepcopy(model.state_dict())
    histories = cross_validate(model, make_data(), [Phase(epochs=3)], config(monitor=monitor, patience=1), folds=2)
    assert not asked
    assert [len(history) for history in histories] == [3, 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("drawn", [False, True])
def test_unreadable_images_are_skipped(tmp_path: Path, drawn: bool) -> None:
    (make_folder(tmp_path) / "green" / "3.png").write_bytes(b"no image")
    transform = create_transform(32, is_training=drawn)
    data = ImageDataset(find_images(tmp_path), transform)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = FineTuneModel(backbone, nn.Linear(4, 3))
    histories = cross_validate(model, data, [HEAD], config(), folds=3)
    counts = [round(history[-1].train_accuracy * 11, 6) % 1 == 0 for history in histories]
    assert sum(counts) >= 2  # folds that train on the broken image use 11 of 12


def test_augmented_views_are_evaluated_on_the_images_themselves(tmp_path: Path) -> None:
    found = find_images(make_folder(tmp_path))
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = FineTuneModel(backbone, nn.Linear(4, 3))
    shown, plain = (ImageDataset(found, create_transform(32, is_training=drawn)) for drawn in (True, False))
    views = config(views=3)
    histories = cross_validate(model, shown, [Phase(epochs=6, lr=0.1)], views, folds=3, evaluated=plain)
    assert all((history[-1].validation_accuracy or 0) > 0.5 for history in histories)


def test_a_fold_has_its_images_in_each_view() -> None:
    rows = Features([torch.arange(10.0), torch.arange(5).repeat(2)], tree_structure(0))  # two views of five images
    fold = Fold(TensorDataset(torch.zeros(5)), [1, 3], {}).select(rows)
    assert [tensor.tolist() for tensor in fold.tensors] == [[1, 3, 6, 8], [1, 3, 1, 3]]


@pytest.mark.parametrize("folds", [1, 61, -1])
def test_an_invalid_number_of_folds_is_refused(folds: int) -> None:
    with pytest.raises(ValueError, match=f"folds = {folds}: expected a whole number from 2 to the 60 images"):
        cross_validate(make_model(), make_data(), [HEAD], config(), folds=folds)
