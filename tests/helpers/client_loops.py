"""Helpers for tests with other libraries: the README's recipes, small images and models, a plain loop to compare."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import pil_to_tensor

import backbone_finetune
from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.commands.settings import CLIPART
from backbone_finetune.recipes.data.images import read_image

README = Path(backbone_finetune.__file__).parent / "recipes" / "README.md"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
CLASSES = ("bird", "clothing", "vehicle")
BATCH_SIZE = 6
EPOCHS = 3
DEEPEST = 2


def groups_at(epoch: int) -> int:
    """Freeze the backbone in the first epoch, and unfreeze one more layer group in each of the next two."""
    return min(epoch, DEEPEST)


def recipe(title: str, **given: Any) -> dict[str, Any]:
    """Run the README's code under a title, with the names that it expects; return all names after it."""
    names = {"__name__": "recipe", **given}
    exec(compile(recipe_code(title), f"the recipe {title}", "exec"), names)
    return names


def recipe_titles() -> list[str]:
    return re.findall(r"^### (.*)$", _own_loops(), flags=re.MULTILINE)


def _own_loops() -> str:
    return README.read_text(encoding="utf-8").split("\n## In your own loop\n")[1]


def recipe_code(title: str) -> str:
    section = _own_loops().split(f"\n### {title}\n")[1].split("\n##")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    return code


def small_images() -> TensorDataset:
    """Return eight images of each of three classes of the packaged clipart, 32 pixels, classes alternating."""
    files = [sorted((CLIPART / name).iterdir())[index] for index in range(8) for name in CLASSES]
    pixels = torch.stack([pil_to_tensor(read_image(file).resize((32, 32))) for file in files])
    return TensorDataset(pixels / 127.5 - 1, torch.arange(len(files)) % len(CLASSES))


def small_model(architecture: str = "test_resnet", **arguments: Any) -> FineTuneModel:
    """Build a model with the same random weights each time, and with other than initial running statistics."""
    torch.manual_seed(0)
    model = FineTuneModel.from_timm(architecture, num_classes=len(CLASSES), **arguments).train()
    with torch.no_grad():
        model(small_images().tensors[0])
    return model


def make_optimizer(model: FineTuneModel) -> torch.optim.Optimizer:
    """Return one optimizer for all phases; its weight decay would change frozen parameters with a gradient."""
    return torch.optim.AdamW(model.param_groups(lr=1e-2, backbone_lr=1e-3, weight_decay=0.1, include_frozen=True))


def make_sgd(model: FineTuneModel) -> torch.optim.Optimizer:
    """Return SGD, for comparing sums in another order: Adam amplifies their rounding where a gradient is near zero."""
    return torch.optim.SGD(model.param_groups(lr=0.05, weight_decay=0.1, include_frozen=True), momentum=0.9)


def train_plainly(
    model: FineTuneModel,
    images: TensorDataset,
    groups_at: Callable[[int], int] = lambda epoch: 0,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    epochs: int = EPOCHS,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> FineTuneModel:
    """Train with the loop that a client's result must equal: in each epoch `groups_at(epoch)` layer groups train."""
    optimizer = optimizer or make_optimizer(model)
    for epoch in range(epochs):
        model.freeze_backbone(trainable_groups=groups_at(epoch)).train()
        for inputs, targets in DataLoader(images, BATCH_SIZE):
            optimizer.zero_grad()
            loss(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


def reloaded(model: FineTuneModel, folder: Path) -> FineTuneModel:
    """Save a model's weights, and load them into a new one in eval mode, which must have the same outputs."""
    torch.save(model.state_dict(), folder / "saved.pt")
    again = small_model()
    again.load_state_dict(torch.load(folder / "saved.pt"), strict=True)
    inputs = small_images().tensors[0]
    assert torch.equal(again.eval()(inputs), model.eval()(inputs))
    return again


def run_two_processes(script: str, log: Path, *launcher: str) -> None:
    """Run a script of this folder, in which each of two processes prints that it agrees with a plain loop."""
    with log.open("w") as opened:
        command = [sys.executable, *launcher, Path(__file__).with_name(script)]
        status = subprocess.run(command, stdout=opened, stderr=opened, check=False, timeout=300)
    assert status.returncode == 0, log.read_text()
    assert log.read_text().count("agrees") == 2


def assert_equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor], *, atol: float = 0.0) -> None:
    """Assert that all tensors are equal by name, bit for bit unless a tolerance is given."""
    torch.testing.assert_close(dict(state), dict(other), rtol=0.0, atol=atol)
