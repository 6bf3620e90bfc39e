"""Trainings that are killed, for test_resuming.py: python training_worker.py FOLDER KILLS SEED.

What is trained has all that a resumption must restore: a classifier with dropout, on cached features or, where the
transform is random, on images; a trainable group with BatchNorm; warm-up and cosine. After a random number of events
(a step begun, a file about to be synced or moved into place) the process gets SIGKILL.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from image_folders import make_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset, TensorDataset

from backbone_finetune import FineTuneModel, cli
from backbone_finetune.recipes.features.cache import FeatureCache
from backbone_finetune.recipes.rng import seed_everything
from backbone_finetune.recipes.training.config import TrainerConfig
from backbone_finetune.recipes.training.loop import fine_tune
from backbone_finetune.recipes.training.phases import Phase
from backbone_finetune.recipes.training.processes import make_accelerator
from backbone_finetune.recipes.training.progress import EpochResult

PHASES = (
    Phase(epochs=3, lr=0.01, cosine=True),
    Phase(epochs=2, trainable_groups=1, lr=0.01, warmup_epochs=0.5, layer_decay=0.8, norm_eval=False),
    Phase(epochs=2, lr=0.01),
)
BATCH_SIZE = 4


class Network(nn.Module):
    """A backbone of two layer groups, with statistics and dropout."""

    def __init__(self, *, normalises: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        norm = nn.BatchNorm2d(16) if normalises else nn.Identity()
        self.last = nn.Sequential(nn.Conv2d(8, 16, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.last(self.stem(images))
        return features


class Shaken(Dataset[tuple[Tensor, int]]):
    """Images with noise from each of the three random generators."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data
        self.transform = self.shake

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self.data[index]
        return self.transform(image), int(target)

    def shake(self, image: Tensor) -> Tensor:
        return image + random.random() * numpy.random.rand() * torch.rand(1)


def make_images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    targets = torch.arange(count) % 3
    noise = torch.randn(count, 3, 8, 8, generator=generator)
    return TensorDataset(noise + torch.eye(3)[targets][:, :, None, None], targets)


def make_model(*, dropout: float, normalises: bool = True) -> FineTuneModel:
    torch.manual_seed(1)
    head = nn.Sequential(nn.Dropout(dropout), nn.Linear(16, 3))
    return FineTuneModel(Network(normalises=normalises), head)


def train_undisturbed(folder: Path, *, cached: bool) -> tuple[FineTuneModel, list[EpochResult]]:
    """Train in a folder, resuming what is there."""
    images: Any = make_images(23)
    folder.mkdir(exist_ok=True)
    loop = TrainerConfig(
        make_accelerator(torch.device("cpu")),
        batch_size=BATCH_SIZE,
        checkpoints=folder / "checkpoints",
        checkpoint_steps=4,
        caches=(FeatureCache(folder / "train", "these"), FeatureCache(folder / "test", "those")) if cached else None,
    )
    model = make_model(dropout=0.3)
    seed_everything(0)
    history = fine_tune(model, images if cached else Shaken(images), make_images(7), PHASES, loop)
    return model, history


def die_after(events: int) -> None:
    """Count steps, fsync calls and renames, and kill this process at the given number; 0 never does."""
    left = [events]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    register_optimizer_step_pre_hook(counted(lambda *_: None))
    os.fsync = counted(os.fsync)
    os.replace = counted(os.replace)


def train_in(folder: Path, kind: str) -> None:
    """Train one kind, and write weights.safetensors and, line by line, the epochs and steps of checkpoints."""
    replace = os.replace

    def replace_and_tell(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name.startswith("step-"):
            with safe_open(target, framework="pt") as opened, (folder / "epochs.txt").open("a") as told:
                progress = json.loads(opened.metadata()["state"])["progress"]
                told.write(f"{len(progress['history'])} {progress['step']}\n")

    os.replace = replace_and_tell  # type: ignore[assignment]
    if kind == "command":
        options = "--model test_resnet --epochs 2 --batch-size 4 --checkpoint-steps 2 --lr 0.01"
        status = cli.main(["train", str(folder / "images"), *options.split(), "--output", str(folder / "run")])
        if status:
            sys.exit(status)
        weights = load_file(folder / "run" / "model.safetensors")
        history = json.loads((folder / "run" / "metrics.json").read_text())["history"]
    else:
        model, history = train_undisturbed(folder, cached=kind == "cached")
        weights = model.state_dict()
    save_file(weights, folder / "weights.safetensors", metadata={"history": repr(history)})


def run_child(folder: Path, kind: str, events: int) -> int:
    """Train in a forked process, which imports nothing again; return its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        die_after(events)
        train_in(folder, kind)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def run_and_kill(folder: Path, kind: str, kills: int, drawn: random.Random) -> list[int]:
    """Train once without and once with kills, each after a random number of events."""
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    for run in (quiet, disturbed):
        make_folder(run / "images", per_class=4)
    codes = [run_child(quiet, kind, 0)]
    for number in range(kills):
        codes.append(run_child(disturbed, kind, drawn.randint(5, 30)))
        if codes[-1] == 0:  # it finished before it could be killed: start again
            disturbed.rename(folder / f"finished-{number}")
            make_folder(disturbed / "images", per_class=4)
    return [*codes, run_child(disturbed, kind, 0)]


def main(folder: str, kills: str, seed: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(1)
    drawn = random.Random(int(seed))
    # Fewer for the whole command, which takes longer.
    counts = {"cached": int(kills), "shaken": int(kills), "command": -(-int(kills) // 2)}
    print(json.dumps({kind: run_and_kill(Path(folder, kind), kind, count, drawn) for kind, count in counts.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
