"""Features: what the classifier sees, computed once, kept on disk, and trusted only while all that made them holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
from recorded_files import record_files
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

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
from backbone_finetune.recipes.features.backbone_pass import autocast_dtype
from backbone_finetune.recipes.features.cache import MANIFEST, build_store, temporary_name

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
    """A backbone that gives three tensors per image, as a step that caches activations at a boundary would."""

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
    """Exact on every processor, unless a test asks for autocast."""
    loader = settings.pop("loader", DataLoader(make_images(), batch_size=4))
    settings.setdefault("autocast", False)
    return extract_features(model, loader, device=CPU, cache=cache, **settings).tensors


def is_mapped(tensor: Tensor) -> bool:
    """Say whether a tensor lies in a file that the system maps, by the system's own table."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "/slot-" in line
    raise AssertionError("a tensor in no part of memory")


class Passes:
    """Count the batches that a backbone sees, from outside: a counter inside would make it another backbone."""

    def __init__(self, model: FineTuneModel) -> None:
        self.count = 0
        model.backbone.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def test_features_are_what_the_classifier_sees_in_evaluation() -> None:
    model, (inputs, targets) = make_model(), make_images().tensors
    nn.Module.train(model.backbone)  # whatever its modes are
    features, kept = extract(model)
    assert torch.equal(kept, targets)
    torch.testing.assert_close(features, model.eval().backbone(inputs))
    torch.testing.assert_close(model.classifier(features), model(inputs))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_features_of_timm_networks_are_those_of_a_forward(name: str) -> None:
    model = FineTuneModel.from_timm(name, num_classes=3).freeze_backbone()
    images = torch.randn(5, 3, *model.pretrained_cfg["input_size"][1:])
    features, _ = extract(model, loader=DataLoader(TensorDataset(images, torch.zeros(5)), batch_size=2))
    torch.testing.assert_close(features, model.eval().backbone(images))
    assert features.untyped_storage().nbytes() == features.nbytes  # a ViT's is a view of all of its tokens


class Caching(nn.Module):
    """A backbone that keeps what it computed in its first forward, as some of timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3 * 8 * 8))
        self.kept: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if not self.kept:
            self.kept.append(torch.arange(3.0 * 8 * 8).cos())
        return images.flatten(1) * (self.weight * self.kept[0])


def test_a_backbone_can_train_afterwards() -> None:
    """What is made in inference_mode can take no part in autograd, and a module may keep it."""
    model = make_model(Caching())
    model.backbone.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    enabled: list[bool] = []
    extract(model)
    assert not any(enabled)
    model.unfreeze_backbone().backbone(make_images().tensors[0]).sum().backward()
    assert model.backbone.weight.grad is not None


@pytest.mark.parametrize("kept", [False, True])
def test_features_take_part_in_autograd(tmp_path: Path, kept: bool) -> None:
    cache = FeatureCache(tmp_path / "train", "data", memory_share=0.0) if kept else None
    model = make_model()
    features, targets = extract(model, cache)
    nn.functional.cross_entropy(model.classifier(features), targets).backward()
    assert model.classifier.weight.grad is not None
    assert not features.requires_grad
    (features.requires_grad_() * 2).sum().backward()
    assert torch.equal(features.grad, torch.full_like(features, 2))


def test_the_model_keeps_its_modes_and_its_memory_format() -> None:
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


def test_a_backbone_that_trains_is_refused(tmp_path: Path) -> None:
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
def test_a_loader_that_loses_the_order_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(make_model(), loader=DataLoader(make_images(), **settings))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(make_images())


@pytest.mark.parametrize("kept", [False, True])
def test_a_stream_of_unknown_length_and_whole_batches_give_the_same_features(tmp_path: Path, kept: bool) -> None:
    cache = FeatureCache(tmp_path / "train", "data") if kept else None
    model = make_model()
    expected = extract(model)
    streamed = extract(model, cache, loader=DataLoader(Stream(), batch_size=4))
    inputs, targets = make_images().tensors
    batches: Any = [(inputs[:4], targets[:4]), (inputs[4:8], targets[4:8]), (inputs[8:], targets[8:])]
    given_whole = extract(model, loader=DataLoader(batches, batch_size=None))
    for found in (streamed, given_whole):
        assert all(map(torch.equal, found, expected))


class Ragged(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 3 if len(images) == 4 else 5)


class Pooled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean()


class Named(nn.Module):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"images": images}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Ragged(), r"a batch holds .*\(5,\).* per image, the first one .*\(3,\).*one shape and dtype"),
        (Pooled(), r"the backbone gave a tensor of shape \(\) for 4 images; it must give"),
        (Named(), r"the backbone gave a dict of 1 for 4 images; it must give a tensor or a tuple"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, backbone: nn.Module, message: str, kept: bool) -> None:
    cache = FeatureCache(tmp_path / "train", "data") if kept else None
    with pytest.raises(ValueError, match=message):
        extract(make_model(backbone), cache)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(torch.zeros(3), 0, 1)], "the loader gave a list of 3; it must give"),
        (
            [torch.zeros(3)],
            r"the loader gave a tensor of shape \(1, 3\); it must give \(inputs, targets\), two tensors",
        ),
        ([], "the loader has no images"),
    ],
)
def test_a_loader_of_something_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(make_model(nn.Flatten()), loader=DataLoader(data))


@pytest.mark.parametrize("memory_share", [0.0, 0.25])
def test_a_tuple_of_any_shapes_and_dtypes_is_kept_to_the_bit(tmp_path: Path, memory_share: float) -> None:
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
    octets = (tmp_path / "train" / "slot-0.bin").read_bytes()
    mapped[0].zero_()  # a copy of the page, and not the file
    assert (tmp_path / "train" / "slot-0.bin").read_bytes() == octets


def test_features_too_large_for_memory_go_to_a_folder_that_disappears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    assert "slot-0.bin" in during
    assert not list(tmp_path.iterdir())
    assert f"too large for memory; on disk under {tmp_path}" in capsys.readouterr().err


def test_a_cache_is_used_again_when_everything_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = FeatureCache(tmp_path / "deep" / "train", "data")
    first = extract(make_model(), cache)
    again = make_model()
    passes = Passes(again)
    assert all(map(torch.equal, extract(again, cache), first))
    assert passes.count == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in cache.folder.parent.iterdir()] == ["train"]


def test_a_cache_holds_hardly_more_than_its_features(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    data: Any = TensorDataset(torch.randn(2000, 256), torch.arange(2000))
    features, targets = extract(make_model(nn.Identity()), cache, loader=DataLoader(data, batch_size=100))
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert size / (features.nbytes + targets.nbytes) < 1.001
    assert size / features.nbytes < 1.01


class Scaled(nn.Module):
    """Images, and an attribute that its `repr` does not show."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.images = Images()
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        features = self.images(images)
        return self.scale(features) if callable(self.scale) else features * self.scale


def edited(class_: type[nn.Module]) -> type[nn.Module]:
    """Give a class of the same name whose forward was edited."""

    def forward(self: Any, images: Tensor) -> Tensor:
        return self.last(self.stem(images)) + 1

    return type(class_.__name__, (class_,), {"forward": forward, "__qualname__": class_.__qualname__})


def set_weight(model: FineTuneModel) -> None:
    with torch.no_grad():
        model.backbone.stem[0].weight[0, 0, 0, 0] += 1e-6


def set_statistic(model: FineTuneModel) -> None:
    model.backbone.stem[1].running_mean[0] += 1


def set_eps(model: FineTuneModel) -> None:
    model.backbone.stem[1].eps = 1e-3


def replace_activation(model: FineTuneModel) -> None:
    model.backbone.stem[2] = nn.GELU()


def edit_forward(model: FineTuneModel) -> None:
    model.backbone.__class__ = edited(Images)


@pytest.mark.parametrize("change", [set_weight, set_statistic, set_eps, replace_activation, edit_forward])
def test_another_backbone_makes_other_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[FineTuneModel], None]
) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    extract(model, cache)
    change(model)
    found = extract(model, cache)
    assert all(map(torch.equal, found, extract(model)))
    assert f"{cache.folder}: made with other backbone; computing them again\n" in capsys.readouterr().err
    passes = Passes(model)
    extract(model, cache)
    assert passes.count == 0


def twice(features: Tensor) -> Tensor:
    return features * 2


@pytest.mark.parametrize(("one", "two"), [(1.0, 2.0), (torch.tensor(1.0), torch.tensor(2.0)), (torch.positive, twice)])
def test_an_attribute_that_is_not_printed_makes_another_backbone(tmp_path: Path, one: Any, two: Any) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    single, double = extract(make_model(Scaled(one)), cache), extract(make_model(Scaled(two)), cache)
    torch.testing.assert_close(double[0], 2 * single[0])


def test_a_classifier_that_was_trained_is_no_other_backbone(tmp_path: Path) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    extract(model, cache)
    model.classifier = nn.Linear(16, 5)
    passes = Passes(model)
    extract(model.train(), cache)
    assert passes.count == 0


def test_other_data_other_precision_and_other_versions_are_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = tmp_path / "train", make_model()
    passes = Passes(model)
    extract(model, FeatureCache(folder, "a"))

    def said() -> str:
        return capsys.readouterr().err.removeprefix(f"features in {folder}: ").removesuffix("; computing them again\n")

    extract(model, FeatureCache(folder, "b"))
    assert said() == "made with other images or transform"
    with monkeypatch.context() as patched:
        patched.setattr(timm, "__version__", "2.0")
        extract(model, FeatureCache(folder, "b"))
        assert said() == "made with other versions"
    extract(model, FeatureCache(folder, "b"), loader=DataLoader(make_images(7), batch_size=4))
    assert said() == "made with other versions"
    extract(model, FeatureCache(folder, "b"))
    assert said() == "made of 7 images, not 11"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    features, _ = extract(model, FeatureCache(folder, "b"), autocast=True)
    assert said() == "made with other precision"
    assert features.dtype == torch.float32
    assert passes.count == 3 + 3 + 3 + 2 + 3 + 3


def truncate(folder: Path) -> None:
    os.truncate(folder / "slot-0.bin", 100)


def lengthen(folder: Path) -> None:
    with open(folder / "slot-1.bin", "ab") as file:
        file.write(b"more")


def flip_a_bit(folder: Path) -> None:
    octets = bytearray((folder / "slot-0.bin").read_bytes())
    octets[50] ^= 1
    (folder / "slot-0.bin").write_bytes(octets)


def remove_a_slot(folder: Path) -> None:
    (folder / "slot-1.bin").unlink()


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


def claim_another_dtype(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["content"]["slots"][0]["dtype"] = "int32"
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"slot-0.bin has 100 bytes, not 704"),
        (lengthen, r"slot-1.bin has 92 bytes, not 88"),
        (flip_a_bit, r"slot-0.bin is garbled"),
        (remove_a_slot, r"slot-1.bin has 0 bytes, not 88"),
        (remove_the_manifest, r"manifest.json is missing or unreadable"),
        (truncate_the_manifest, r"manifest.json is missing or unreadable"),
        (garble_the_manifest, r"manifest.json is missing or unreadable"),
        (nest_the_manifest, r"manifest.json is missing or unreadable"),
        (foreign_manifest, r"manifest.json is missing or unreadable"),
        (claim_another_dtype, r"manifest.json is garbled, or of another version"),
    ],
)
def test_a_damaged_cache_is_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    expected = extract(model, cache)
    damage(cache.folder)
    assert all(map(torch.equal, extract(model, cache), expected))
    assert capsys.readouterr().err == f"features in {cache.folder}: {reason}; computing them again\n"
    extract(model, cache)
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_folder_of_other_files_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    model = make_model()
    passes = Passes(model)
    with pytest.raises(FileExistsError, match=r"holds other files than cached features \(thesis.tex\); pass a folder"):
        extract(model, FeatureCache(tmp_path, "data"))
    with pytest.raises(FileExistsError, match=r"thesis.tex is a file; pass a folder of its own for the cache"):
        extract(model, FeatureCache(tmp_path / "thesis.tex", "data"))
    assert passes.count == 0
    with pytest.raises(FileExistsError, match=r"holds other files than cached features"):
        build_store(tmp_path, [], {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_in_the_place_of_a_slot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "slot-9.bin").mkdir()
    (tmp_path / "slot-9.bin" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds other files than cached features \(slot-9\.bin\)"):
        extract(make_model(), FeatureCache(tmp_path, "data"))
    assert (tmp_path / "slot-9.bin" / "thesis.tex").exists()


@pytest.mark.skipif(os.name != "posix", reason="links take privileges elsewhere")
@pytest.mark.parametrize("is_there", [False, True])
def test_a_cache_may_be_a_link(tmp_path: Path, is_there: bool) -> None:
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
        assert passes.count == 0
        assert (tmp_path / "links" / "train").is_symlink()
        assert (tmp_path / "disk" / "real" / MANIFEST).is_file()
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["train"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are named there")
def test_a_cache_is_on_the_disk_before_it_moves_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    events = record_files(monkeypatch)
    extract(make_model(), cache)
    new = temporary_name(cache.folder, os.getpid()).name
    moved = events.index(f"move {new} train")
    assert events[:moved] == ["sync slot-0.bin", "sync slot-1.bin", f"sync {MANIFEST}", f"sync {new}"]
    assert events[moved + 1 :] == [f"sync {tmp_path.name}"]


def test_an_error_while_building_leaves_the_older_cache_and_nothing_else(tmp_path: Path) -> None:
    cache, model = FeatureCache(tmp_path / "train", "data"), make_model()
    expected = extract(model, cache)
    other = FeatureCache(tmp_path / "train", "other data")
    passes = Passes(model)

    def fail(*_: Any) -> None:
        if passes.count == 3:
            raise KeyboardInterrupt

    hook = model.backbone.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        extract(model, other)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    hook.remove()
    assert all(map(torch.equal, extract(model, cache), expected))
    assert passes.count == 3


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


def test_another_process_its_peak_memory_its_cache_and_what_it_leaves_when_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three tests in one, since a process takes seconds to import torch."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(ANOTHER_PROCESS), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        peaks = [int(process.stdout.readline()) / 1024 for _ in range(2)]
        assert process.stdout.readline() == "stalled\n"
        process.send_signal(signal.SIGKILL)

    # 32 images are 8 MiB of features and 1024 are 256 MiB: 248 MiB more, were they in memory at any time.
    assert (tmp_path / "1024 images" / "slot-0.bin").stat().st_size == 256 * 2**20
    assert peaks[1] - peaks[0] < 32

    # Hashes of strings and the order of sets differ between processes; a fingerprint must not.
    torch.manual_seed(1)
    model = FineTuneModel.from_timm("test_vit", num_classes=3).freeze_backbone()
    passes = Passes(model)
    loader: Any = DataLoader(TensorDataset(torch.ones(5, 3, 160, 160), torch.arange(5)), 2)
    expected = extract(model, FeatureCache(tmp_path / "whole", "data"), loader=loader, autocast=True)
    assert passes.count == 0

    killed = FeatureCache(tmp_path / "killed", "data")
    leftover = temporary_name(killed.folder, process.pid)
    assert leftover.exists()
    assert not killed.folder.exists()
    assert all(map(torch.equal, extract(model, killed, loader=loader, autocast=True), expected))
    assert passes.count == 3
    assert not leftover.exists()
    assert capsys.readouterr().err == ""


def test_a_build_of_another_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "train", "data")
    other = temporary_name(cache.folder, os.getppid())
    other.mkdir()
    with subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL) as ended:
        temporary_name(cache.folder, ended.pid).mkdir()
    extract(make_model(), cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "train"]


def test_progress_is_shown_with_a_title_only(capfd: pytest.CaptureFixture[str]) -> None:
    extract(make_model())
    assert capfd.readouterr().err == ""
    extract(make_model(), title="features, train")
    assert capfd.readouterr().err.replace("\r", "\n").splitlines()[-1].startswith("features, train: 100%")


def test_bf16_only_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen: list[torch.dtype] = []
    model.backbone.last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    for supported, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        seen.clear()
        with torch.autocast("cpu", enabled=not supported):  # what the caller chose for the rest counts for nothing
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


def test_batches_of_features_are_those_of_a_shuffling_loader() -> None:
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


@pytest.mark.usefixtures("one_thread")  # the time of a process is that of all its threads, those that wait too
def test_batches_of_features_are_indexed_at_once(tmp_path: Path) -> None:
    data: Any = TensorDataset(torch.randn(6_000, 64), torch.arange(6_000))
    mapped = extract_features(
        make_model(nn.Identity()), DataLoader(data, 1000), device=CPU, cache=FeatureCache(tmp_path / "a", "", 0.0)
    )

    def epoch(batches: Any) -> float:
        start = time.process_time()
        for _ in batches:
            pass
        return time.process_time() - start

    seconds = [min(epoch(loader) for _ in range(3)) for loader in (feature_batches(mapped, 64), DataLoader(data, 64))]
    assert seconds[0] < seconds[1] / 2


def test_features_of_a_frozen_phase_serve_the_next_frozen_one(tmp_path: Path) -> None:
    model, images = make_model(), make_images(6)
    passes = Passes(model)
    caches = (FeatureCache(tmp_path / "train", "train"), FeatureCache(tmp_path / "test", "test"))
    loop = TrainerConfig(make_accelerator(CPU), batch_size=6, caches=caches, show_progress=False)
    head, deeper = Phase(epochs=1), Phase(epochs=1, trainable_groups=1)
    fine_tune(model, images, images, [head, deeper], loop)
    before = passes.count
    fine_tune(model, images, images, [deeper, head, head, head], loop)
    # One step and one look at the test in the deeper phase; train and test once more for all the frozen ones.
    assert passes.count - before == 1 + 1 + 2
