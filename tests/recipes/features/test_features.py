"""Features: computed once, kept on disk, and used again while the key is equal and eight images give the same."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import (
    FeatureCache,
    Phase,
    TrainerConfig,
    extract_features,
    feature_batches,
    fine_tune,
    make_accelerator,
)
from backbone_finetune.recipes.features.cache import MANIFEST, SLOT
from backbone_finetune.recipes.features.frozen_pass import autocast_dtype

CPU = torch.device("cpu")


class Images(nn.Module):
    """A backbone with statistics and dropout."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Sequential(nn.Conv2d(8, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.stem(images))


class Mixed(nn.Module):
    """A backbone that returns three tensors per image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = images * self.weight
        return scaled.bfloat16(), (scaled.mean((1, 2, 3)) * 10).to(torch.int8), scaled.flatten(1)


def make_model(backbone: nn.Module | None = None) -> FineTuneModel:
    torch.manual_seed(1)
    return FineTuneModel(backbone or Images(), nn.Linear(16, 3)).freeze_backbone()


def make_images(count: int = 11) -> Any:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 3)


def extract(model: FineTuneModel, cache: FeatureCache | None = None, **settings: Any) -> tuple[Tensor, ...]:
    """Turn off autocast, so that results are exact on every processor; a test may turn it on."""
    loader = settings.pop("loader", DataLoader(make_images(), batch_size=4))
    settings.setdefault("autocast", False)
    return extract_features(model, loader, device=settings.pop("device", CPU), cache=cache, **settings).tensors


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor is in a memory-mapped file, from the system's table."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "/backbone-features-" in line
    raise AssertionError("a tensor in no part of memory")


CHECKED = 8  # images in one batch, if stored features are used again


class Passes:
    """Count the batches and the images that a backbone sees."""

    def __init__(self, model: FineTuneModel) -> None:
        self.count = self.images = 0
        model.backbone.register_forward_hook(self)

    def __call__(self, _module: Any, inputs: Any, _output: Any) -> None:
        self.count += 1
        self.images += len(inputs[0])


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return the messages that were logged since the last call."""
    caplog.set_level("INFO", "backbone_finetune")

    def take() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return take


Logged = Callable[[], list[str]]


def test_features_are_the_classifiers_input_in_eval_mode(device: torch.device) -> None:
    model, (inputs, targets) = make_model().to(device), make_images().tensors
    nn.Module.train(model.backbone)  # in any mode
    features, kept = extract(model, device=device)
    model.cpu()
    assert torch.equal(kept, targets)
    torch.testing.assert_close(features, model.eval().backbone(inputs))
    torch.testing.assert_close(model.classifier(features), model(inputs))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_features_of_timm_networks_are_those_of_a_forward(name: str, device: torch.device) -> None:
    model = FineTuneModel.from_timm(name, num_classes=3).freeze_backbone().to(device)
    images = torch.randn(5, 3, *model.pretrained_cfg["input_size"][1:])
    loader = DataLoader(TensorDataset(images, torch.zeros(5)), batch_size=2)
    features, _ = extract(model, loader=loader, device=device)
    torch.testing.assert_close(features, model.cpu().eval().backbone(images), rtol=1e-4, atol=1e-4)
    assert features.untyped_storage().nbytes() == features.nbytes  # a ViT's output is a view of all tokens


class Caching(nn.Module):
    """A backbone that caches a tensor of its first forward, like some timm networks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3 * 8 * 8))
        self.kept: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(torch.arange(3.0 * 8 * 8).cos())
        return images.flatten(1) * (self.weight * self.kept[0])


def test_a_backbone_can_train_afterwards() -> None:
    """Tensors from inference_mode cannot be used in autograd, and a module may cache them."""
    model = make_model(Caching())
    model.backbone.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    enabled: list[bool] = []
    extract(model)
    assert not any(enabled)
    model.unfreeze_backbone().backbone(make_images().tensors[0]).sum().backward()
    assert model.backbone.weight.grad is not None


@pytest.mark.parametrize("kept", [False, True])
def test_features_can_be_used_in_autograd(tmp_path: Path, kept: bool) -> None:
    cache = FeatureCache(tmp_path / "train", "data", memory_share=0.0) if kept else None
    model = make_model()
    features, targets = extract(model, cache)
    nn.functional.cross_entropy(model.classifier(features), targets).backward()
    assert model.classifier.weight.grad is not None
    assert not features.requires_grad
    (features.requires_grad_() * 2).sum().backward()
    assert torch.equal(features.grad, torch.full_like(features, 2))


def test_extraction_does_not_change_modes_and_memory_format() -> None:
    model = make_model().train()
    model.classifier.eval()
    model.backbone.stem[0].train()
    before = [(module, module.training) for module in model.modules()]
    strides = [parameter.stride() for parameter in model.parameters()]
    with model.assert_frozen():
        extract(model)
        model.backbone.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            extract(model)
    assert [(module, module.training) for module in model.modules()] == before
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_a_trainable_backbone_raises(tmp_path: Path) -> None:
    model = make_model()
    model.backbone.last[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"features of a backbone that trains change.*call freeze_backbone\(\) first"):
        extract(model, FeatureCache(tmp_path / "train", "data"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shuffle": True, "batch_size": 4}, "the loader draws by RandomSampler; pass one"),
        ({"drop_last": True, "batch_size": 4}, "the loader drops its last images; pass one with drop_last=False"),
        ({"sampler": SubsetRandomSampler([0, 1])}, "the loader draws by SubsetRandomSampler; pass one"),
        ({"sampler": SubsetRandomSampler([0, 1]), "batch_size": None}, "the loader draws by SubsetRandomSampler"),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler([1]), 2, False)}, "draws by SubsetRandomSampler; pass"),
        ({"batch_sampler": [[2, 1], [0]]}, "the loader draws by list; pass one that gives every image in"),
    ],
)
def test_a_shuffling_loader_raises(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(make_model(), loader=DataLoader(make_images(), **settings))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(make_images())


def test_iterable_datasets_and_batched_datasets_give_the_same_features(tmp_path: Path) -> None:
    model = make_model()
    expected = extract(model)
    streamed = extract(model, loader=DataLoader(Stream(), batch_size=4))
    inputs, targets = make_images().tensors
    batches: Any = [(inputs[:4], targets[:4]), (inputs[4:8], targets[4:8]), (inputs[8:], targets[8:])]
    given_whole = extract(model, loader=DataLoader(batches, batch_size=None))
    for found in (streamed, given_whole):
        assert all(map(torch.equal, found, expected))
    for loader in (DataLoader(Stream(), batch_size=4), DataLoader(batches, batch_size=None)):
        with pytest.raises(
            ValueError, match=r"a stream or a loader of whole batches cannot be cached; pass DataLoader"
        ):
            extract(model, FeatureCache(tmp_path / "train", "data"), loader=loader)
    assert not list(tmp_path.iterdir())


class Ragged(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 3 if len(images) == 4 else 5)


class Pooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean()


class Named(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"images": images, "scale": 1.0}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Ragged(), r"a batch holds .*\([35],\).* per image, another one .*\([35],\).*one shape and dtype"),
        (Pooled(), r"the backbone gave a tensor of shape \(\) for [48] images; it must give"),
        (Named(), r"the backbone gave a float for [48] images; it must give tensors with one entry per image"),
    ],
)
def test_features_that_cannot_be_stored_raise(tmp_path: Path, backbone: nn.Module, message: str, kept: bool) -> None:
    cache = FeatureCache(tmp_path / "train", "data") if kept else None
    with pytest.raises(ValueError, match=message):
        extract(make_model(backbone), cache)
    assert not list(tmp_path.glob(f"train/{MANIFEST}"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(3), 0, 1)], r"rows have 2 inputs before the target, which Flatten\.forward\(.* does not take"),
        ([torch.zeros(3)], r"the loader gave a tensor of shape \(1, 3\); the dataset must return \(input, target\)"),
        ([{"image": torch.zeros(3), "label": 0}], r"the loader gave a dict of image, label; the dataset must return"),
        ([(torch.zeros(3), "cat")], r"the loader gave a list of 2; the dataset must return \(input, target\)"),
        ([], "the loader has no images"),
    ],
)
def test_a_loader_of_other_items_raises(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(make_model(nn.Flatten()), loader=DataLoader(data))


@pytest.mark.parametrize("memory_share", [0.0, 0.25])
def test_a_tuple_of_any_shapes_and_dtypes_is_stored_exactly(tmp_path: Path, memory_share: float) -> None:
    model = make_model(Mixed())
    cache = FeatureCache(tmp_path / "train", "data", memory_share)
    inputs, targets = make_images().tensors
    expected = (*model.backbone(inputs), targets)
    for found in (extract(model), extract(model, cache), extract(model, cache)):
        assert [slot.dtype for slot in found] == [torch.bfloat16, torch.int8, torch.float32, torch.int64]
        assert all(map(torch.equal, found, expected))


def test_only_features_larger_than_the_share_stay_on_disk(tmp_path: Path) -> None:
    model = make_model()
    mapped = extract(model, FeatureCache(tmp_path / "train", "data", memory_share=0.0))
    read = extract(model, FeatureCache(tmp_path / "train", "data"))
    for slot in (0, 1):
        assert is_mapped(mapped[slot])
        assert not is_mapped(read[slot])
    octets = (tmp_path / "train" / SLOT.format(0)).read_bytes()
    mapped[0].zero_()  # changes a copy of the page, not the file
    assert (tmp_path / "train" / SLOT.format(0)).read_bytes() == octets


def test_features_too_large_for_memory_are_in_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make_model()
    expected = extract(model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64}))
    during: list[str] = []
    model.backbone.register_forward_hook(lambda *_: during.extend(path.name for path in tmp_path.glob("*/*")))
    found = extract(model)
    assert all(map(torch.equal, found, expected))
    assert is_mapped(found[0])
    assert SLOT.format(0) in during
    assert not list(tmp_path.iterdir())
    assert f"features: on disk in {tmp_path}" in logged()[0]


def test_a_cache_is_used_again_if_nothing_changed(tmp_path: Path, logged: Logged) -> None:
    cache = FeatureCache(tmp_path / "deep" / "train", "data")
    images: Any = make_images(30)
    first = extract(make_model(), cache, loader=DataLoader(images, 4))
    again = make_model()
    passes = Passes(again)
    assert all(map(torch.equal, extract(again, cache, loader=DataLoader(images, 4)), first))
    assert (passes.count, passes.images) == (1, CHECKED)
    assert logged() == []
    assert [path.name for path in cache.folder.parent.iterdir()] == ["train"]


def test_the_images_that_are_checked_are_spread_over_the_dataset(tmp_path: Path) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model(nn.Flatten())
    images: Any = TensorDataset(torch.arange(141.0)[:, None], torch.zeros(141))
    extract(model, cache, loader=DataLoader(images, 4))
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].flatten().tolist()))
    seen: list[float] = []
    extract(model, cache, loader=DataLoader(images, 4))
    assert seen == [0, 20, 40, 60, 80, 100, 120, 140]


def test_a_cache_has_little_overhead_on_disk(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    data: Any = TensorDataset(torch.randn(2000, 256), torch.arange(2000))
    features, targets = extract(make_model(nn.Identity()), cache, loader=DataLoader(data, batch_size=100))
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert size / (features.nbytes + targets.nbytes) < 1.001
    assert size / features.nbytes < 1.01


OFFSET = 0.0


def offset() -> float:
    return OFFSET


class Read(Images):
    """Images, and everything that a forward may read besides its weights."""

    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.note = "nobody reads this"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale * self.gain + offset()


def set_weight(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.backbone.stem[0].weight[0, 0, 0, 0] += 1e-6


def set_statistic(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.stem[1].running_mean[0] += 1e-6


def replace_activation(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.stem[2] = nn.GELU()


def set_attribute(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.scale = 1.01


def set_class_attribute(_: FineTuneModel, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Read, "gain", 1.01)


def replace_forward(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.forward = lambda images: Read.forward(model.backbone, images) * 1.01


def add_hook(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.stem[2].register_forward_hook(lambda _module, _inputs, output: output * 1.01)


def add_pre_hook(model: FineTuneModel, _: pytest.MonkeyPatch) -> None:
    model.backbone.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.01,))


def set_global(_: FineTuneModel, patched: pytest.MonkeyPatch) -> None:
    patched.setitem(globals(), "OFFSET", 0.01)


BY_KEY = "stored for other frozen modules"
DAMAGED = "incomplete or damaged"
BY_CHECK = "8 images give other features now than those stored"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_weight, BY_KEY),
        (set_statistic, BY_KEY),
        (replace_activation, BY_KEY),
        (set_attribute, BY_CHECK),
        (set_class_attribute, BY_CHECK),
        (replace_forward, BY_CHECK),
        (add_hook, BY_CHECK),
        (add_pre_hook, BY_CHECK),
        (set_global, BY_CHECK),
    ],
)
def test_a_changed_backbone_recomputes_features(
    tmp_path: Path,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[FineTuneModel, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model(Read())
    extract(model, cache)
    assert logged() == []
    change(model, monkeypatch)
    found = extract(model, cache)
    assert all(map(torch.equal, found, extract(model)))
    assert logged() == [f"features in {cache.folder}: {reason}; computing new ones"]
    passes = Passes(model)
    extract(model, cache)
    assert passes.count == 1
    assert logged() == []


def test_changes_without_effect_on_features_keep_the_cache(tmp_path: Path, logged: Logged) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model(Read())
    extract(model, cache)
    model.backbone.note = "still nobody"
    model.backbone.lock = threading.Lock()
    passes = Passes(model)
    extract(model, cache)
    assert passes.count == 1
    assert logged() == []


def test_changed_data_recomputes_features(tmp_path: Path, logged: Logged) -> None:
    """A user's name for the data may stay the same although images or targets have changed."""
    cache, model = FeatureCache(tmp_path / "train", "my images"), make_model()
    inputs, targets = make_images().tensors
    for changed in (TensorDataset(inputs * 1.1, targets), TensorDataset(inputs * 1.1, targets + 1)):
        extract(model, cache)
        logged()
        found = extract(model, cache, loader=DataLoader(changed, batch_size=4))  # type: ignore[arg-type]
        assert torch.equal(found[1], changed.tensors[1])
        assert logged() == [f"features in {cache.folder}: {BY_CHECK}; computing new ones"]


def test_the_check_tolerates_rounding_by_the_batch_size(tmp_path: Path, logged: Logged) -> None:
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        model = FineTuneModel.from_timm(name, num_classes=3).freeze_backbone()
        images: Any = TensorDataset(torch.randn(11, 3, *model.pretrained_cfg["input_size"][1:]), torch.zeros(11))
        cache = FeatureCache(tmp_path / name, "data")
        extract(model, cache, loader=DataLoader(images, batch_size=1))
        extract(model, cache, loader=DataLoader(images, batch_size=11))
    assert logged() == []


def test_a_trained_classifier_keeps_the_cache(tmp_path: Path) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    extract(model, cache)
    model.classifier = nn.Linear(16, 5)
    passes = Passes(model)
    extract(model.train(), cache)
    assert passes.count == 1


def test_other_data_precision_or_versions_recompute_features(
    tmp_path: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "train", make_model()
    passes = Passes(model)
    extract(model, FeatureCache(folder, "a"))

    def said() -> str:
        [message] = logged()
        return message.removeprefix(f"features in {folder}: ").removesuffix("; computing new ones")

    extract(model, FeatureCache(folder, "b"))
    assert said() == "stored for other images"
    with monkeypatch.context() as patched:
        patched.setattr(timm, "__version__", "2.0")
        extract(model, FeatureCache(folder, "b"))
        assert said() == "stored for other versions"
    extract(model, FeatureCache(folder, "b"), loader=DataLoader(make_images(7), batch_size=4))
    assert said() == "stored for other image count and other versions"
    extract(model, FeatureCache(folder, "b"))
    assert said() == "stored for other image count"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    features, _ = extract(model, FeatureCache(folder, "b"), autocast=True)
    assert said() == "stored for other precision"
    assert features.dtype == torch.float32
    assert passes.count == 4 + 4 + 4 + 3 + 4 + 4


def truncate(folder: Path) -> None:
    os.truncate(folder / SLOT.format(0), 100)


def lengthen(folder: Path) -> None:
    with open(folder / SLOT.format(1), "ab") as file:
        file.write(b"more")


def fill_with_zeros(folder: Path) -> None:
    (folder / SLOT.format(0)).write_bytes(bytes(704))


def remove_a_slot(folder: Path) -> None:
    (folder / SLOT.format(1)).unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def truncate_the_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 60)


def garble_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(os.urandom(200))


def nest_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 100_000)


def foreign_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('["something", "else"]')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        *(
            (damage, DAMAGED)
            for damage in (truncate, lengthen, remove_a_slot, remove_the_manifest, truncate_the_manifest)
        ),
        *((damage, DAMAGED) for damage in (garble_the_manifest, nest_the_manifest, foreign_manifest)),
        (fill_with_zeros, BY_CHECK),
    ],
)
def test_a_damaged_cache_is_recomputed(
    tmp_path: Path, logged: Logged, damage: Callable[[Path], None], reason: str
) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    expected = extract(model, cache)
    damage(cache.folder)
    assert all(map(torch.equal, extract(model, cache), expected))
    assert logged() == [f"features in {cache.folder}: {reason}; computing new ones"]
    extract(model, cache)
    assert logged() == []
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path, logged: Logged) -> None:
    for name in ("thesis.tex", "manifest.json", "lock", "slot-0.bin", "features-0.bin"):
        (tmp_path / name).write_text("years of work")
    model = make_model()
    for data in ("these", "others"):
        expected = extract(model, FeatureCache(tmp_path, data))
    assert all(map(torch.equal, extract(model, FeatureCache(tmp_path, "others")), expected))
    kept = [path for path in tmp_path.iterdir() if not path.name.startswith("backbone-features")]
    assert len(kept) == 5
    assert {path.read_text() for path in kept} == {"years of work"}
    logged()
    extract(model, FeatureCache(tmp_path / "thesis.tex", "data"))
    assert logged() == [
        f"{tmp_path / 'thesis.tex'} cannot hold the features (File exists); going on without this cache"
    ]


@pytest.mark.skipif(os.name != "posix", reason="links take privileges elsewhere")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_cache_may_be_a_symbolic_link(tmp_path: Path, is_there: bool) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train").symlink_to(tmp_path / "disk" / "real")
    (tmp_path / "disk").mkdir()
    if is_there:
        (tmp_path / "disk" / "real").mkdir()
    model = make_model()
    for data in ("these", "others"):
        cache = FeatureCache(tmp_path / "links" / "train", data)
        extract(model, cache)
        passes = Passes(model)
        extract(model, cache)
        assert passes.count == 1
        assert (tmp_path / "links" / "train").is_symlink()
        assert (tmp_path / "disk" / "real" / MANIFEST).is_file()
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["train"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


def test_rows_are_synced_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power failure there must be no manifest of rows that were not written."""
    cache, synced = FeatureCache(tmp_path / "train", "data"), []
    sync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, (cache.folder / MANIFEST).exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    extract(make_model(), cache)
    assert synced[:2] == [(704, False), (88, False)]
    assert (cache.folder / MANIFEST).exists()


def test_an_error_while_building_leaves_no_valid_cache(tmp_path: Path, logged: Logged) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    passes = Passes(model)

    def fail(*_: Any) -> None:
        if passes.count == 3:
            raise KeyboardInterrupt

    hook = model.backbone.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        extract(model, cache)
    hook.remove()
    assert all(map(torch.equal, extract(model, cache), extract(model)))
    assert logged() == [f"features in {cache.folder}: {DAMAGED}; computing new ones"]


FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_at_once(patched: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))


def fail_while_writing(patched: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    patched.setattr(os, "fsync", full)


@pytest.mark.parametrize("fail", [fail_at_once, fail_while_writing])
def test_on_a_full_disk_features_are_in_memory(
    tmp_path: Path, logged: Logged, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    expected = extract(model)
    with monkeypatch.context() as patched:
        fail(patched)
        assert all(map(torch.equal, extract(model, cache), expected))
        [message] = logged()
        assert message.startswith(f"{cache.folder} cannot hold the features (")
        assert message.endswith("; going on without this cache")
        patched.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 64}))
        with pytest.raises(ValueError, match=r"too large for memory, and .*features-.* cannot hold the features"):
            extract(model, cache)


def test_an_error_of_the_dataset_is_not_reported_as_a_disk_error(tmp_path: Path) -> None:
    class Broken(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            raise FileNotFoundError(f"image {index} is gone")

    with pytest.raises(FileNotFoundError, match="image 0 is gone"):
        extract(make_model(), FeatureCache(tmp_path / "train", "data"), loader=DataLoader(Broken()))


def test_the_second_of_two_builders_waits_and_reads(tmp_path: Path, logged: Logged) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    first, second = make_model(), make_model()
    passes = Passes(second)
    started = threading.Event()

    def stall(*_: Any) -> None:
        started.set()
        while not any("waiting for another process" in record for record in logged()):
            time.sleep(0.001)
        hook.remove()

    hook = first.backbone.register_forward_hook(stall)
    with ThreadPoolExecutor(2) as threads:
        building = threads.submit(extract, first, cache)
        started.wait()
        reading = threads.submit(extract, second, cache)
        assert all(map(torch.equal, reading.result(), building.result()))
    assert passes.count == 1


def run_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


ANOTHER_PROCESS = """
    import resource, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    from backbone_finetune import FineTuneModel
    from backbone_finetune.recipes import FeatureCache, extract_features

    folder = Path(sys.argv[1])

    class Many(Dataset):
        def __init__(self, count):
            self.count = count
        def __len__(self):
            return self.count
        def __getitem__(self, index):
            return torch.full((8,), float(index)), index

    def extract(model, data, name, batch_size, share):
        loader = DataLoader(data, batch_size)
        extract_features(model, loader, device=torch.device("cpu"), cache=FeatureCache(folder / name, "data", share))

    wide = FineTuneModel(nn.Linear(8, 65536).requires_grad_(False), nn.Linear(65536, 2))
    for count in (32, 1024):
        extract(wide, Many(count), f"{count} images", 16, 0.0)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)

    torch.manual_seed(1)
    model = FineTuneModel.from_timm("test_vit", num_classes=3).freeze_backbone()
    images = TensorDataset(torch.ones(5, 3, 160, 160), torch.arange(5))
    extract(model, images, "whole", 2, 0.25)

    batches = []
    def stall(*_):
        batches.append(0)
        if len(batches) == 3:
            print("stalled", flush=True)
            time.sleep(600)
    model.backbone.register_forward_hook(stall)
    extract(model, images, "killed", 2, 0.25)
"""


@pytest.mark.long
def test_another_process_its_peak_memory_its_cache_and_what_it_leaves_when_killed(
    tmp_path: Path, logged: Logged
) -> None:
    """Three tests in one, because a process takes seconds to import torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(ANOTHER_PROCESS), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peaks = [int(process.stdout.readline()) / 1024 for _ in range(2)]
        assert process.stdout.readline() == "stalled\n"
        process.send_signal(signal.SIGKILL)

    # 32 images are 8 MiB of features and 1024 are 256 MiB: 248 MiB more if they were in memory.
    assert (tmp_path / "1024 images" / SLOT.format(0)).stat().st_size == 256 * 2**20
    assert peaks[1] - peaks[0] < 32

    # Hashes of strings and the order of sets differ between processes; keys must not.
    torch.manual_seed(1)
    model = FineTuneModel.from_timm("test_vit", num_classes=3).freeze_backbone()
    passes = Passes(model)
    loader: Any = DataLoader(TensorDataset(torch.ones(5, 3, 160, 160), torch.arange(5)), 2)
    expected = extract(model, FeatureCache(tmp_path / "whole", "data"), loader=loader, autocast=True)
    assert passes.count == 1
    assert logged() == []

    killed = FeatureCache(tmp_path / "killed", "data")
    assert (killed.folder / SLOT.format(0)).exists()
    assert not (killed.folder / MANIFEST).exists()
    assert all(map(torch.equal, extract(model, killed, loader=loader, autocast=True), expected))
    assert passes.count == 1 + 1 + 3  # the check of each cache, and three batches
    assert logged() == [f"features in {killed.folder}: {DAMAGED}; computing new ones"]


def test_progress_is_shown_only_with_a_title(capfd: pytest.CaptureFixture[str]) -> None:
    extract(make_model())
    assert capfd.readouterr().err == ""
    extract(make_model(), title="features, train")
    assert capfd.readouterr().err.replace("\r", "\n").splitlines()[-1].startswith("features, train: 100%")


def test_bf16_is_used_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen: list[torch.dtype] = []
    model.backbone.last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    for supported, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        seen.clear()
        with torch.autocast("cpu", enabled=not supported):  # the caller's own autocast has no effect
            features, _ = extract(model, autocast=True)
        assert set(seen) == {dtype}
        assert features.dtype == torch.float32
        seen.clear()
        extract(model, autocast=False)
        assert set(seen) == {torch.float32}
    assert autocast_dtype(model.backbone.bfloat16(), CPU) is None


def test_images_go_through_convolutions_in_channels_last() -> None:
    model = make_model()
    model.backbone.stem[0].register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    strides: list[tuple[int, ...]] = []
    extract(model)
    assert strides[0] == (192, 1, 24, 3)


def test_batches_of_features_equal_those_of_a_shuffling_loader() -> None:
    features = TensorDataset(torch.randn(11, 2), torch.arange(11))
    for drop_last in (False, True):
        ours = feature_batches(features, 4, generator=torch.Generator().manual_seed(3), drop_last=drop_last)
        torchs: Any = DataLoader(
            features, 4, shuffle=True, generator=torch.Generator().manual_seed(3), drop_last=drop_last
        )
        assert len(ours) == len(torchs)
        for _ in range(2):
            for own, expected in zip(ours, torchs, strict=True):
                assert all(map(torch.equal, own, expected))
    in_order = torch.cat([targets for _, targets in feature_batches(features, 4)])
    assert torch.equal(in_order, torch.arange(11))


def test_batches_of_features_are_indexed_at_once() -> None:
    indexed = []

    class Counting(TensorDataset):
        def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
            indexed.append(len(index))
            return super().__getitem__(index)

    assert len(list(feature_batches(Counting(torch.randn(11, 3), torch.arange(11)), 4))) == 3
    assert indexed == [4, 4, 3]


def test_features_are_reused_by_the_next_frozen_phase(tmp_path: Path) -> None:
    model, images = make_model(), make_images(6)
    passes = Passes(model)
    caches = (FeatureCache(tmp_path / "train", "train"), FeatureCache(tmp_path / "test", "test"))
    loop = TrainerConfig(make_accelerator(CPU), batch_size=6, caches=caches, show_progress=False)
    fine_tune(model, images, images, [Phase(epochs=1)] * 3, loop)
    assert passes.count == 2 * 2 + 2 * 2  # a sample of each, and in the first phase all images
