"""Loading: the same batches with any number of workers, errors that name the sample, exactly timm's values."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from image_folders import make_folder
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from torchvision import transforms

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import Phase, TrainerConfig, fine_tune, make_accelerator
from backbone_finetune.recipes.data.images import IGNORED, ImageDataset
from backbone_finetune.recipes.data.loading import DeviceLoader, default_workers
from backbone_finetune.recipes.data.sources.finding import find_images
from backbone_finetune.recipes.data.transforms import split_transform
from backbone_finetune.recipes.training.batches import LocalBatch, load_batches

CPU = torch.device("cpu")


class Drawn(Dataset[Any]):
    """Samples with random numbers from each generator."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.cat([torch.rand(1), torch.tensor([random.random(), numpy.random.rand()])]), index


class Failing(Drawn):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 5:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 48), (31, 90), (20, 20)])
def test_both_halves_together_equal_timms_transform(mode: str, size: tuple[int, int]) -> None:
    noise = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype("uint8")
    transform = create_transform((3, 32, 32), crop_pct=0.875, crop_mode=mode, interpolation="bicubic")
    to_bytes, normalize = split_transform(transform)
    assert normalize is not None
    loaded = to_bytes(Image.fromarray(noise))
    assert loaded.dtype == torch.uint8
    assert torch.equal(normalize(loaded), transform(Image.fromarray(noise)))
    assert torch.equal(normalize(loaded[None])[0], normalize(loaded))


@pytest.mark.parametrize(
    "transform",
    [
        torch.rand_like,
        transforms.ToTensor(),
        transforms.Compose([transforms.ToTensor()]),
        create_transform(32, is_training=True, re_prob=0.5),
    ],
)
def test_other_transforms_are_not_split(transform: Any) -> None:
    assert split_transform(transform) == (transform, None)


class RecordMoves(TorchFunctionMode):
    """Records the dtypes of the batches that are moved to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].ndim == 4 and isinstance(args[1], torch.device):
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_images_are_loaded_as_bytes_and_normalized_on_the_device(tmp_path: Path) -> None:
    data = ImageDataset(find_images(make_folder(tmp_path)), create_transform(32))
    expected = torch.stack([data[index][0] for index in range(len(data))])
    with RecordMoves() as moves:
        inputs, targets = next(iter(DeviceLoader(data, CPU, batch_size=len(data))))
    assert moves.dtypes == [torch.uint8]
    assert torch.equal(inputs, expected)
    assert tuple(targets.tolist()) == data.folder.targets


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_random_numbers_of_a_sample_depend_on_seed_and_index(workers: int) -> None:
    shares = [LocalBatch(torch.tensor(indices), num_real=len(indices)) for indices in ([6, 0, 3], [1, 2])]
    expected = [list(load_batches(Drawn(), shares, seed="0 1")), list(load_batches(Drawn(), shares[1:], seed="0 1"))]
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    loaded = list(load_batches(Drawn(), shares, workers=workers, seed="0 1"))
    after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    for found, wanted in zip(loaded, expected[0], strict=True):
        assert all(map(torch.equal, found, wanted))
    assert torch.equal(loaded[1][0], expected[1][0][0])  # a run that resumes at the second batch
    assert len({float(value) for inputs, _ in loaded for value in inputs.flatten()}) == 15
    other = next(load_batches(Drawn(), shares, workers=workers, seed="0 2"))
    assert not (other[0] == loaded[0][0]).any()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no good"), (ValueError, r"^sample 5: no good$")),
        (KeyError("label"), (RuntimeError, r"^sample 5: 'label' \(KeyError\)$")),
        (FileNotFoundError("good file"), (FileNotFoundError, r"^sample 5: good file$")),
        (json.JSONDecodeError("no good", "{", 1), (RuntimeError, r"^sample 5: no good: .* \(JSONDecodeError\)$")),
    ],
)
def test_an_error_of_a_worker_names_the_sample(error: Exception, expected: tuple[type[Exception], str]) -> None:
    with pytest.raises(expected[0], match=expected[1]):
        list(DeviceLoader(Failing(error), CPU, batch_size=2, workers=1))
    with pytest.raises(type(error), match=r"good|label"):  # here it is in the traceback
        list(DeviceLoader(Failing(error), CPU, batch_size=2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_fails_names_the_image(tmp_path: Path, workers: int) -> None:
    def fail(image: Image.Image) -> Tensor:
        raise IndexError("out of range")

    data = ImageDataset(find_images(make_folder(tmp_path)), fail)
    with pytest.raises(RuntimeError, match=r"blue/0\.png: its transform failed: IndexError: out of range"):
        list(DeviceLoader(data, CPU, workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_keeps_its_position_without_a_target(tmp_path: Path, workers: int) -> None:
    (make_folder(tmp_path) / "green" / "3.png").write_bytes(b"no image")
    data = ImageDataset(find_images(tmp_path), create_transform(32))
    loaded = list(DeviceLoader(data, CPU, batch_size=5, workers=workers))
    targets = torch.cat([targets for _, targets in loaded])
    assert (targets == IGNORED).nonzero().flatten().tolist() == [9]
    assert sum(len(inputs) for inputs, _ in loaded) == len(data) == 18
    (problem,) = data.broken.values()
    assert problem.startswith(f"{tmp_path / 'green' / '3.png'}: not a readable image (")


def flip_or_not(image: Image.Image) -> Tensor:
    tensor = transforms.functional.to_tensor(image)
    return tensor.flip(-1) if random.random() < 0.5 else tensor


@pytest.mark.parametrize("trainable_groups", [0, 1])
@pytest.mark.parametrize("transform", [create_transform(32), flip_or_not])
def test_training_is_the_same_with_any_number_of_workers_and_broken_images(
    tmp_path: Path, transform: Any, trainable_groups: int, caplog: pytest.LogCaptureFixture
) -> None:
    (make_folder(tmp_path) / "green" / "3.png").write_bytes(b"no image")
    found = find_images(tmp_path)
    outcomes = []
    for workers in (0, 2):
        caplog.clear()
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = FineTuneModel(backbone, nn.Linear(4, 3))
        data = ImageDataset(found, transform)
        config = TrainerConfig(make_accelerator(CPU), batch_size=4, workers=workers, show_progress=False)
        phase = Phase(epochs=2, lr=0.01, backbone_lr=0.01, trainable_groups=trainable_groups)
        history = fine_tune(model, data, data, [phase], config)
        assert [message for message in caplog.messages if "skipped: " in message] == [
            f"skipped: {tmp_path / 'green' / '3.png'}: not a readable image (cannot identify image file)"
        ]
        assert round((history[-1].validation_accuracy or 0) * 17, 6) % 1 == 0  # 17 images count
        assert round(history[-1].train_accuracy * 17, 6) % 1 == 0
        outcomes.append((history, [parameter.detach().clone() for parameter in model.parameters()]))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(map(torch.equal, outcomes[0][1], outcomes[1][1]))


def test_the_default_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [default_workers(count) for count in (10, 999, 1000, 10**6)] == [0, 0, 8, 8]
    assert default_workers(10**6, processes=4) == 2
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert default_workers(10**6) == 0


@pytest.mark.long
def test_a_killed_script_leaves_no_workers(tmp_path: Path) -> None:
    """No ``if __name__ == "__main__":`` is needed, and no worker, which would keep the parent's locks, survives."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, torch\n"
        "from backbone_finetune.recipes.data.loading import DeviceLoader\n"
        "class Data:\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, index): return torch.tensor([os.getpid()]), index\n"
        "loader = iter(DeviceLoader(Data(), torch.device('cpu'), batch_size=1, workers=2))\n"
        "print(int(next(loader)[0]), int(next(loader)[0]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    workers = [int(number) for number in done.stdout.split()]
    assert len(set(workers)) == 2
    deadline = time.monotonic() + 60
    while any(is_running(number) for number in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("kind", "queued"), [("mps", False), ("meta", True)])
def test_a_batch_for_mps_is_copied_before_its_memory_is_freed(kind: str, queued: bool) -> None:
    found: set[bool] = set()

    class Recorded(TorchFunctionMode):
        """Records how tensors are sent to the device, and leaves them on the CPU."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to and args[1:] == (torch.device(kind),):
                found.add(kwargs["non_blocking"])
                return args[0]
            return func(*args, **(kwargs or {}))

    with Recorded():
        next(iter(DeviceLoader(Drawn(), torch.device(kind))))
    assert found == {queued}
