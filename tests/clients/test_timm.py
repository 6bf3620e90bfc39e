"""The parts of timm's train.py and validate.py; no package has the scripts themselves."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from client_loops import BATCH_SIZE, CLASSES, EPOCHS, assert_equal, recipe, train_plainly
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import find_images

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    sys.modules["mine"] = types.ModuleType("mine")
    recipe("timm", __name__="mine")


def build() -> FineTuneModel:
    """Build a model as train.py does: it seeds, and passes missing arguments as None."""
    torch.manual_seed(0)
    model: FineTuneModel = timm.create_model(
        "resnet18_fine_tuned", num_classes=len(CLASSES), drop_rate=None, in_chans=3
    )
    return model


def build_optimizer(model: FineTuneModel) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.5)


def test_optimizer_saver_and_averaging_do_not_change_frozen_tensors(images: TensorDataset, tmp_path: Path) -> None:
    model = build()
    optimizer, averaged = build_optimizer(model), ModelEmaV3(model, decay=0.9)
    saver = CheckpointSaver(model, optimizer, model_ema=averaged, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    before = {name: model.state_dict()[name].clone() for name in model.frozen_names()}
    with model.assert_frozen():
        for epoch in range(EPOCHS):
            train_plainly(model, images, lambda _: 1, optimizer=optimizer, epochs=1)
            averaged.update(model)
            saver.save_checkpoint(epoch, metric=epoch)
    # The classifier, and the two blocks of layer4.
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25}
    average = averaged.module.state_dict()
    assert_equal({name: average[name] for name in before}, before)

    resumed = build()
    its_optimizer = build_optimizer(resumed)
    assert resume_checkpoint(resumed, str(tmp_path / "checkpoint-1.pth.tar"), its_optimizer) == 2
    train_plainly(resumed, images, lambda _: 1, optimizer=its_optimizer, epochs=1)
    assert_equal(resumed.state_dict(), model.state_dict())
    best = build()
    load_checkpoint(best, str(tmp_path / "model_best.pth.tar"), use_ema=True)
    assert_equal(best.state_dict(), average)


def accuracy(network: nn.Module, folder: Path, class_map: str) -> float:
    """Compute the accuracy as validate.py does for a folder of classes."""
    dataset = create_dataset("", str(folder), split="", class_map=class_map)
    pixels = {"input_size": (3, 32, 32), "crop_pct": 1.0, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    one_process = {"use_prefetcher": False, "num_workers": 0, "device": torch.device("cpu")}
    loader = create_loader(dataset, batch_size=BATCH_SIZE, **pixels, **one_process)
    with torch.no_grad():
        right = [network(inputs).argmax(1) == targets for inputs, targets in loader]
    return torch.cat(right).float().mean().item()


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm does not close files
def test_the_accuracy_in_plain_timm_is_the_same_with_a_class_map(images: TensorDataset, tmp_path: Path) -> None:
    inputs, targets = (tensor[:20] for tensor in images.tensors)  # 7, 7 and 6 images per class
    for index, (image, target) in enumerate(zip(inputs, targets, strict=True)):
        path = tmp_path / "images" / ("1", "10", "2")[target] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(image / 2 + 0.5, path)
    class_names = find_images(tmp_path / "images").class_names
    assert class_names == ("1", "10", "2")
    model = train_plainly(build(), images, lambda _: 1, epochs=1)
    with torch.no_grad():
        model.classifier.bias[1] = 1e3  # it predicts the class 10 for every image
    torch.save(model.to_module().state_dict(), tmp_path / "plain.pth")
    (tmp_path / "classes.txt").write_text("\n".join(class_names) + "\n")

    plain = timm.create_model("resnet18", num_classes=len(CLASSES), checkpoint_path=tmp_path / "plain.pth").eval()
    assert torch.equal(plain(inputs), model(inputs))
    assert accuracy(plain, tmp_path / "images", str(tmp_path / "classes.txt")) == pytest.approx(7 / 20)
    assert accuracy(plain, tmp_path / "images", "") == pytest.approx(6 / 20)  # timm's second class is the folder 2
