"""Phases of a partly frozen model: cached tensors are computed once, and steps equal those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import FeatureCache, Phase, TrainerConfig, fine_tune, make_accelerator
from backbone_finetune.recipes.training.phase_data import prepare_data

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two layer groups; the first counts its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.seen = 0
        self.stem.register_forward_hook(self.count)

    def count(self, _module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
        self.seen += len(inputs[0])

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.last(self.stem(images))
        return features.flatten(1)


class Noisy(Network):
    """A backbone whose frozen part draws random numbers in any mode."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.5))


def make_images(count: int = 24) -> Any:
    targets = torch.arange(count) % 3
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return TensorDataset(noise + torch.eye(3)[targets][:, :, None, None], targets)


def train(network: nn.Module, data: Any, phases: list[Phase], **settings: Any) -> tuple[FineTuneModel, list[Any]]:
    torch.manual_seed(1)
    model = FineTuneModel(network, nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 3)))
    config = TrainerConfig(make_accelerator(CPU), batch_size=7, show_progress=False, **settings)
    torch.manual_seed(2)
    return model, fine_tune(model, data, make_images(12), phases, config)


def network(kind: type[Network] = Network) -> Network:
    torch.manual_seed(0)
    return kind()


ONE_GROUP = Phase(epochs=3, trainable_groups=1, lr=0.01, backbone_lr=0.01)


@pytest.mark.parametrize("settings", [{}, {"memory_share": 0.0}, {"accumulation": 2}])
def test_training_on_cached_tensors_equals_training_the_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    caches = (FeatureCache(tmp_path / "train", "these"), FeatureCache(tmp_path / "test", "those"))
    phases = [Phase(epochs=1, lr=0.01), ONE_GROUP]
    settings = {"autocast_features": False, **settings}
    whole, expected = train(network(), make_images(), phases, cache_features=False, **settings)
    for kept in (None, caches):
        cached, found = train(network(), make_images(), phases, caches=kept, **settings)
        torch.testing.assert_close(cached.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-4)
        for one, other in zip(found, expected, strict=True):
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
            assert one.validation_accuracy == pytest.approx(other.validation_accuracy, abs=1 / 12 + 1e-6)


def test_frozen_modules_run_once_for_any_number_of_epochs() -> None:
    seen = []
    for epochs in (1, 9):
        part = network()
        train(part, make_images(), [Phase(epochs=epochs, trainable_groups=1)])
        seen.append(part.seen)
    assert seen[0] == seen[1]
    whole = network()
    train(whole, make_images(), [Phase(epochs=9, trainable_groups=1)], cache_features=False)
    assert whole.seen == 9 * (24 + 12)


def test_a_backbone_without_parameters_runs_once() -> None:
    seen: list[int] = []
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.ZeroPad1d((0, -32)))
    pixels.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    train(pixels, make_images(), [Phase(epochs=5)])
    assert sum(seen) == 24 + 12


def test_a_random_frozen_part_is_not_cached_and_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    _, history = train(network(Noisy), make_images(), [ONE_GROUP])
    [message] = caplog.messages
    assert message.startswith("features are not cached, and the whole model runs in every step: ")
    assert [result.why_uncached for result in history] == [message.partition("every step: ")[2]] * 3


def test_an_epoch_has_the_reason_why_the_whole_model_ran() -> None:
    phases = [Phase(epochs=1), Phase(epochs=1, trainable_groups=2)]
    _, history = train(network(), make_images(), phases)
    assert [result.why_uncached for result in history] == [None, "no layer is frozen"]
    _, history = train(network(), make_images(), phases[:1], cache_features=False)
    assert [result.why_uncached for result in history] == ["--cache off (in Python: cache_features=False)"]


def test_a_fully_trainable_model_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    train(network(), make_images(), [Phase(epochs=1, trainable_groups=2)])
    assert caplog.messages == []


def test_a_compiler_is_not_used_for_a_part_of_a_backbone(caplog: pytest.LogCaptureFixture) -> None:
    compiled: list[nn.Module] = []
    train(network(), make_images(), [ONE_GROUP], compile=lambda module: compiled.append(module) or module)
    assert compiled == []
    assert caplog.messages == ["features: not compiled; a compiler takes a backbone that is frozen as a whole"]


class Drawn(Dataset[tuple[Tensor, int]]):
    """Random images, drawn at each read; it records them."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float]] = []
        self.transform = torch.rand_like

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        value = torch.rand(1)
        self.draws.append((index, value.item()))
        return value.expand(3, 8, 8) + 10 * index, index % 3


def test_views_are_drawn_once_and_used_by_epoch_and_index() -> None:
    """Each image has one value in all pixels, 10 apart from other images', so views can be identified."""
    data, part = Drawn(), network()
    shown: list[Tensor] = []
    part.last.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].mean((1, 2, 3))))
    model = FineTuneModel(part, nn.Linear(16, 3))
    config = TrainerConfig(make_accelerator(CPU), batch_size=5, show_progress=False, views=2)
    fine_tune(model, data, make_images(3), [Phase(epochs=4, trainable_groups=1)], config)
    draws = {index: {value for other, value in data.draws if other == index} for index in range(5)}
    assert [len(values) for values in draws.values()] == [3, 2, 2, 2, 2]  # the first image is read before the pass
    first, second, third, fourth = (rows.sort().values for rows in [rows for rows in shown if len(rows) == 5][-4:])
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)
    assert not (first == second).any()


@pytest.mark.parametrize(("views", "draws"), [(1, 4), (3, 3)])
def test_views_work_with_a_frozen_backbone(views: int, draws: int) -> None:
    data = Drawn()
    train(network(), data, [Phase(epochs=4)], views=views)
    assert [len({value for other, value in data.draws if other == index}) for index in range(1, 5)] == [draws] * 4


@pytest.mark.parametrize("groups", [0, 1])
def test_rows_are_the_same_with_any_number_of_workers(groups: int) -> None:
    phase = Phase(epochs=1, trainable_groups=groups, lr=0.01)
    states = []
    for workers in (0, 1, 2, None):
        model, _ = train(network(), make_images(200), [phase], workers=workers)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(tensor, state[name]) for name, tensor in states[0].items())


class Ragged(nn.Module):
    """Returns other features from the image of value 100 on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) * self.scale)[:, : 5 if bool((images > 100).any()) else 16]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_raised(workers: int) -> None:
    images = TensorDataset(torch.arange(140.0)[:, None, None, None].expand(-1, 3, 8, 8), torch.arange(140) % 3)
    with pytest.raises(ValueError, match=r"a batch holds .*\(5,\).* per image, another one .*\(16,\)"):
        train(Ragged(), images, [Phase(epochs=1)], workers=workers)


@pytest.mark.parametrize("faulty", ["train", "validation"])
def test_a_wrong_target_is_named_by_its_part(faulty: str) -> None:
    data = {"train": make_images(9), "validation": make_images(9)}
    data[faulty].tensors[1][5] = 3
    model = FineTuneModel(network(), nn.Linear(16, 3)).freeze_backbone()
    config = TrainerConfig(make_accelerator(CPU), show_progress=False)
    with pytest.raises(ValueError, match=f"^{faulty}: target 3 is outside"):
        prepare_data(model, data["train"], data["validation"], config)
