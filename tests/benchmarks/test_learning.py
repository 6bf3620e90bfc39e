"""`learning.py`: each way to train matches its name, and the sets are split as described."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import learning
import pytest
import torch
from learning_runs import arms, sets
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import nn

from backbone_finetune import FineTuneModel

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFIER = {"classifier.weight", "classifier.bias"}
BY_NAME = {arm.name: arm for arm in arms.ARMS}


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Write the files of Fashion-MNIST with 5 images per class, each with a different shade."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    images = b"".join(bytes([number]) * 28 * 28 for number in range(50))
    for name, content in zip(sets.FASHION_FILES, (bytes(16) + images, bytes(8) + bytes(range(10)) * 5), strict=True):
        (folder / name).write_bytes(gzip.compress(content))
    return folder


@pytest.fixture
def views() -> sets.Views:
    model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    return sets.make_views(resolve_model_data_config(model, args={"input_size": (3, 32, 32)}))


@pytest.fixture
def train() -> sets.Images:
    torch.manual_seed(0)
    images = [Image.fromarray(torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()) for _ in range(6)]
    return sets.Images("train", images, torch.arange(6) % 2)


def test_a_small_run_writes_a_line_for_each_arm_and_resumes(
    tmp_path: Path, fashion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--splits", "1", "--head-epochs", "1", "--backbone-epochs", "1", "--image-size", "32"]
    command += ["--fashion-train", "30", "--fashion-test", "20", "--sets", "Fashion-MNIST"]
    command += ["--fashion-mnist", str(fashion), "--output", str(tmp_path / "learning")]
    assert learning.main([*command, "--arms", "frozen head"]) == 0
    first = json.loads((tmp_path / "learning.json").read_text())["outcomes"]
    assert learning.main([*command, "--head-epochs", "2"]) == 2
    assert "learning.json has results of other settings" in capsys.readouterr().err
    assert learning.main(command) == 0
    content = json.loads((tmp_path / "learning.json").read_text())
    assert content["outcomes"][:1] == first  # with equal seconds: it did not train again
    assert [outcome["arm"] for outcome in content["outcomes"]] == list(BY_NAME)
    assert all(set(outcome["accuracy"]) == {"plain", "mirror", "views"} for outcome in content["outcomes"])
    page = (tmp_path / "learning.md").read_text()
    assert all(f"| {arm} " in page for arm in BY_NAME)
    assert all(f"| {first} / {second} " in page for first, second in learning.PAIRS)


def test_missing_files_raise_with_their_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        learning.main(["--fashion-mnist", str(tmp_path), "--output", str(tmp_path / "learning")])
    assert "apt install dataset-fashion-mnist" in capsys.readouterr().err


def test_fashion_is_balanced_and_its_split_disjoint(fashion: Path) -> None:
    train, test = sets.split_fashion(fashion, 30, 20, seed=1)
    shades = [[image.getpixel((0, 0))[0] for image in side.images] for side in (train, test)]  # type: ignore[index]
    assert sorted(shades[0] + shades[1]) == list(range(50))
    for side, own in zip((train, test), shades, strict=True):
        assert side.targets.bincount().tolist() == [len(own) // 10] * 10
        assert [shade % 10 for shade in own] == side.targets.tolist()


def test_a_view_is_the_same_each_time(views: sets.Views, train: sets.Images) -> None:
    assert torch.equal(train.view(views, 3), train.view(views, 3))
    assert not torch.equal(train.view(views, 3), train.view(views, 4))
    assert torch.equal(train.view(views, None)[0], views.plain(train.images[0]))


@pytest.mark.parametrize("name", BY_NAME)
def test_an_arm_trains_the_parameters_of_its_name(name: str, views: sets.Views, train: sets.Images) -> None:
    arm = BY_NAME[name]
    network = FineTuneModel.from_timm("test_resnet", num_classes=2).freeze_backbone()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model, seconds = arms.train_arm(arm, network, train, views, arms.Plan(head_epochs=1, backbone_epochs=1))
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    groups = model.layer_groups
    trained = groups if arm.trainable_groups is None else groups[len(groups) - arm.trainable_groups :]
    parameters = {f"backbone.{parameter}" for group in trained for parameter in group.parameter_names}
    assert {key for key, value in model.named_parameters() if value.requires_grad} == parameters | CLASSIFIER
    assert "classifier.weight" in moved
    assert moved & dict(model.named_parameters()).keys() <= parameters | CLASSIFIER
    assert bool(parameters) == any(key in moved for key in parameters)
    if arm.recipe:
        assert all(f"backbone.{path}.running_mean" in moved for path, module in _norms(model.backbone))
    else:
        statistics = {key.rpartition(".")[0] for key in moved if key.endswith("running_mean")}
        owners = {key.rpartition(".")[0] for key in parameters} if not arm.norm_eval else set()
        assert statistics == {f"backbone.{path}" for path, _ in _norms(model.backbone)} & owners
    assert seconds > 0
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def _norms(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]


def test_epochs_on_cached_views_equal_those_of_the_whole_network(views: sets.Views, train: sets.Images) -> None:
    network = FineTuneModel.from_timm("test_resnet", num_classes=2).freeze_backbone()
    plan = arms.Plan(head_epochs=1, backbone_epochs=3)
    cached, _ = arms.train_arm(arms.Arm("", 1, 2), network, train, views, plan)
    shown = [train.view(views, number) for number in range(2)]
    whole, _ = arms.train_arm(arms.Arm("", 0), network, train, views, plan)
    whole.freeze_backbone(trainable_groups=1).train()
    optimizer = torch.optim.AdamW(
        whole.param_groups(lr=arms.HEAD_LR, backbone_lr=arms.BACKBONE_LR, weight_decay=arms.WEIGHT_DECAY)
    )
    for epoch in range(3):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(epoch))
        images = torch.stack([shown[(epoch + index) % 2][index] for index in order.tolist()])
        optimizer.zero_grad()
        nn.functional.cross_entropy(whole(images), train.targets[order]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.testing.assert_close(cached.state_dict(), whole.state_dict())


def test_probabilities_of_test_views_are_averaged() -> None:
    class Fixed(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    sure, unsure = torch.tensor([[4.0, 0.0]]).view(1, 2, 1, 1), torch.tensor([[0.0, 1.0]]).view(1, 2, 1, 1)
    accuracy = arms.accuracies(Fixed(), [unsure, sure, unsure, unsure], torch.tensor([0]))
    assert accuracy == {"plain": 0.0, "mirror": 1.0, "views": 0.0}
