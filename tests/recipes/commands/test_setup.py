"""The data of a run: the image size is one that the network supports, and common layouts of folders work."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from image_folders import make_folder
from safetensors.torch import load_file
from torchrun import torchrun

from backbone_finetune.cli import main
from backbone_finetune.recipes.commands.evaluate import evaluate_images
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.setup import make_task
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.models.file import build_transform, load_trained_model
from backbone_finetune.recipes.training.processes import make_accelerator


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("halonet26t", (3, 256, 256)), ("bat_resnext26ts", (3, 256, 256)), ("test_resnet", (3, 96, 96))],
)
def test_clipart_has_a_size_that_the_network_supports(
    architecture: str, size: tuple[int, int, int], tmp_path: Path
) -> None:
    settings = TrainSettings(architecture=architecture, output=tmp_path / "run")
    task = make_task(settings, make_accelerator(torch.device("cpu"), mixed_precision=None))
    assert task.data_config["input_size"] == size
    image, _ = task.train[0]
    with torch.no_grad():
        assert task.model.eval()(image[None]).shape == (1, 10)
    assert list(tmp_path.iterdir()) == []


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        make_folder(tmp_path / "data" / name)
    settings = TrainSettings(images=tmp_path / "data", architecture="test_resnet", views=2, output=tmp_path / "run")
    task = make_task(settings, make_accelerator(torch.device("cpu"), mixed_precision=None))
    plain = build_transform(task.data_config)
    for data in (task.parts["validation"], task.parts["test"]):
        assert torch.equal(data[0][0], plain(read_image(data.folder.paths[0])))
    (phase,) = task.phases
    assert phase.augment is not None
    shown = task.train.augmented(phase.augment)
    assert not torch.equal(shown[0][0], shown[0][0])


def test_train_and_val_folders_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data" / "train", per_class=4)
    make_folder(tmp_path / "data" / "val", per_class=2)
    small = ["--model", "test_resnet", "--epochs", "1", "--device", "cpu"]
    assert main(["train", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    tested = f"test: 6 images from {tmp_path}/data/val, the validation images, as nothing is chosen on them\n"
    assert tested in printed.out
    assert "images by class, train + test: blue 4 + 2, green 4 + 2, red 4 + 2\n" in printed.out
    assert "6 of 6 test images are also among the training images, byte for byte" in printed.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["class_names"], metrics["test_images"]) == (["blue", "green", "red"], 6)


def test_a_run_with_a_table_and_a_separate_test_set_is_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "other", per_class=1)
    images = sorted(make_folder(tmp_path / "data", per_class=4).rglob("*.png"))
    table = tmp_path / "images.csv"
    rows = (f"{path.relative_to(tmp_path)},{path.parent.name}" for path in images)
    table.write_text("\n".join(["path,label", *rows]))
    given = [str(table), "--test", str(tmp_path / "other"), "--output", str(tmp_path / "run")]
    assert main(["train", *given, "--model", "test_resnet", "--epochs", "1", "--device", "cpu"]) == 0
    assert "test: 3 images from " in capsys.readouterr().out
    again = ["train", "--run", str(tmp_path / "run" / "run.json"), "--output", str(tmp_path / "again")]
    assert main([*again, "--validation", str(tmp_path / "other")]) == 2
    assert "--validation and --run" in capsys.readouterr().err
    assert main(again) == 0
    assert "this run differs" not in capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("folders", "options", "found"),
    [
        (("val", "test"), (), ("validation", "test")),
        (("val", "test"), ("--monitor", "off"), ("test",)),
        (("val",), (), ("test",)),
        (("val",), ("--monitor", "loss", "--patience", "1"), ("validation",)),
        ((), ("--monitor", "balanced-accuracy"), ("validation", "test")),
    ],
)
def test_the_best_epoch_is_chosen_on_validation_images_alone(
    tmp_path: Path, folders: tuple[str, ...], options: tuple[str, ...], found: tuple[str, ...]
) -> None:
    make_folder(tmp_path / "data" / "train", per_class=8)
    for name in folders:
        make_folder(tmp_path / "data" / name, per_class=3)
    small = ["--model", "test_resnet", "--epochs", "3", "--lr", "0.05", "--batch-size", "8"]
    assert main(["train", str(tmp_path / "data"), *small, *options, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    chosen = metrics["best_epoch"]
    assert (chosen is not None) == ("validation" in found and "off" not in options)
    assert (metrics["test_accuracy"] is not None) == ("test" in found)
    assert ("validation_images" in record) == (metrics["validation_images"] > 0)
    if chosen is not None:
        values = {
            "loss": [-epoch["validation_loss"] for epoch in metrics["history"]],
            "balanced-accuracy": [epoch["validation_balanced_accuracy"] for epoch in metrics["history"]],
        }.get(options[1] if options else "", [epoch["validation_accuracy"] for epoch in metrics["history"]])
        assert chosen == values.index(max(values)) + 1
        assert metrics["validation_accuracy"] == metrics["history"][chosen - 1]["validation_accuracy"]
    assert main(["train", "--run", str(tmp_path / "run" / "run.json"), "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["history"] == metrics["history"]


def test_the_test_accuracy_is_that_of_the_written_model(tmp_path: Path) -> None:
    """With the best epoch kept, and in float32, as `evaluate` computes it from the file."""
    for name, count in (("train", 8), ("val", 3), ("test", 4)):
        make_folder(tmp_path / "data" / name, per_class=count)
    small = ["--model", "test_resnet", "--epochs", "4", "--lr", "0.1", "--batch-size", "8"]
    assert main(["train", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    trained = load_trained_model(tmp_path / "run" / "model.safetensors")
    for part, name in (("test", "test_accuracy"), ("val", "validation_accuracy")):
        evaluation = evaluate_images(trained, tmp_path / "data" / part, show_progress=False)
        assert evaluation.accuracy == metrics[name]


def test_folds_are_those_of_the_training_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data" / "train", per_class=8)
    make_folder(tmp_path / "data" / "val", per_class=3)
    small = ["--model", "test_resnet", "--epochs", "3", "--lr", "0.05", "--batch-size", "8"]
    arguments = ["train", str(tmp_path / "data"), *small, "--output"]
    assert main([*arguments, str(tmp_path / "run"), "--folds", "4"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["fold_accuracies"]) == 4
    assert all(round(accuracy * 6, 6) % 1 == 0 for accuracy in metrics["fold_accuracies"])  # 6 of 24 images each
    assert "\n4 folds          " in capsys.readouterr().out
    listed = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    folded = [row for row in listed if row["split"] == "train"]  # by models that did not train on them
    assert [row["image"] for row in folded] == sorted(
        str(path) for path in (tmp_path / "data" / "train").rglob("*.png")
    )
    right = sum(int(row["right"]) for row in folded)
    assert right == pytest.approx(6 * sum(metrics["fold_accuracies"]))
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    plain, folded = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run"))
    assert all(torch.equal(tensor, folded[name]) for name, tensor in plain.items())


def test_too_many_folds_are_refused_before_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data", per_class=4)
    arguments = ["train", str(tmp_path / "data"), "--model", "test_resnet", "--epochs", "1", "--output"]
    assert main([*arguments, str(tmp_path / "run"), "--folds", "10"]) == 2
    assert "folds = 10: expected a whole number from 2 to the 9 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_chance_is_of_the_readable_images(tmp_path: Path) -> None:
    for name in ("train", "test"):
        make_folder(tmp_path / "data" / name, per_class=4)
        for index in range(6):
            (tmp_path / "data" / name / "red" / f"broken{index}.png").write_bytes(b"no image")
    small = ["--model", "test_resnet", "--epochs", "1", "--lr", "0.01", "--output", str(tmp_path / "run")]
    assert main(["train", str(tmp_path / "data"), *small]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["test_images"], metrics["chance"]) == (12, 4 / 12)


@pytest.mark.parametrize("options", [(), ("--trainable-only",)])
def test_a_model_file_is_trained_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """With its classifier if the classes are the same: at a rate of next to nothing, it answers as before."""
    same, fewer = make_folder(tmp_path / "same"), make_folder(tmp_path / "fewer")
    shutil.rmtree(fewer / "green")
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    first, second, third = (tmp_path / name / "model.safetensors" for name in ("first", "second", "third"))
    small = ["--epochs", "1", "--batch-size", "8", "--lr"]
    start = ["--model", "test_resnet", "--checkpoint", str(weights), "--output", str(first.parent)]
    assert main(["train", str(same), *small, "0.1", *start]) == 0
    assert main(["train", str(same), *small, "1e-12", "--checkpoint", str(first), "--output", str(second.parent)]) == 0
    assert f"test_resnet, weights from {first}, with its classifier, on" in capsys.readouterr().out
    before, after = (load_file(path) for path in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    for folder, lr in ((same, 1e-3), (fewer, None)):  # a rate keeps the classifier
        settings = TrainSettings(images=folder, checkpoint=first, output=third.parent)
        assert make_task(settings, make_accelerator(torch.device("cpu"))).phases[0].lr == lr
    capsys.readouterr()
    further = ["--checkpoint", str(first), "--output", str(third.parent), *options]
    assert main(["train", str(fewer), *small, "0.1", *further]) == 0
    assert "with a new classifier, as its classes are blue, green, red" in capsys.readouterr().out
    trained = load_trained_model(third, base=first if options else None)
    assert trained.class_names == ("blue", "red")
    backbone = trained.model.backbone.state_dict()
    assert all(torch.equal(backbone[name.removeprefix("backbone.")], before[name]) for name in before if "bac" in name)
    other = ["train", str(same), "--model", "test_vit", "--checkpoint", str(first), "--output", str(tmp_path / "x")]
    assert main(other) == 2
    assert "is a model on test_resnet; leave out --model and --pretrained with it" in capsys.readouterr().err


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
@pytest.mark.long
def test_weights_that_one_process_cannot_read_end_all_with_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", per_class=2)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "0.pth")  # and 1.pth is on another machine
    options = [str(tmp_path / "data"), "--model", "test_resnet", "--device", "cpu", "--output", str(tmp_path / "run")]
    (tmp_path / "run.py").write_text(
        "import os, sys\nfrom backbone_finetune.cli import main\n"
        f"sys.exit(main(['train', *{options}, '--checkpoint', f'{tmp_path}/{{os.environ[\"RANK\"]}}.pth']))\n"
    )
    finished = torchrun(str(tmp_path / "run.py"))
    assert finished.returncode != 0
    lines = [line for line in finished.stderr.splitlines() if line.startswith("backbone-finetune: error")]
    assert lines == [f"backbone-finetune: error: {tmp_path}/1.pth: there is no such file; pass a file of weights"]
