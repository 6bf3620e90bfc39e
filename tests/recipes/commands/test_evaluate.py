"""Evaluation: each image is counted once, and skipped images are listed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from image_folders import COLOURS, make_folder, make_image
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.commands.evaluate import evaluate_images
from backbone_finetune.recipes.commands.reporting.evaluation_files import write_evaluation
from backbone_finetune.recipes.commands.reporting.scores import Evaluation
from backbone_finetune.recipes.models.file import TrainedModel


class BrightestColour(nn.Module):
    """Predicts the strongest channel of an image; the classes are the channels, then two more."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        return torch.cat([means, torch.full((len(means), 2), -9.0)], 1)


@pytest.fixture
def trained() -> TrainedModel:
    model = FineTuneModel(nn.Sequential(BrightestColour()), nn.Linear(5, 5))
    with torch.no_grad():
        model.classifier.weight.copy_(torch.eye(5))
        model.classifier.bias.zero_()
    config = timm.data.resolve_model_data_config(timm.create_model("test_resnet")) | {"input_size": (3, 32, 32)}
    return TrainedModel(model, "brightest", ("red", "green", "blue", "pink", "white"), config)


def test_each_image_is_counted_in_the_confusion_matrix(trained: TrainedModel, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, per_class=4)
    make_image(folder / "red" / "really_green.png", COLOURS["green"])
    make_image(folder / "pink" / "really_blue.png", COLOURS["blue"])
    evaluation = evaluate_images(trained, folder, batch_size=3, show_progress=False)
    assert evaluation.confusion == (
        (4, 1, 0, 0, 0),
        (0, 4, 0, 0, 0),
        (0, 0, 4, 0, 0),
        (0, 0, 1, 0, 0),
        (0, 0, 0, 0, 0),
    )
    assert (evaluation.accuracy, evaluation.images) == (12 / 14, 14)
    assert evaluation.balanced_accuracy == pytest.approx((4 / 5 + 1 + 1 + 0) / 4)  # white has no images
    assert [score.precision for score in evaluation.classes] == [1.0, 4 / 5, 4 / 5, None, None]
    assert [score.recall for score in evaluation.classes] == [4 / 5, 1.0, 1.0, 0.0, None]
    assert evaluation.missing_classes == ("white",)
    lines = evaluation.describe().splitlines()
    assert lines[1].split()[:4] == ["red", "5", "1.000", "0.800"]
    assert lines[5].split() == ["white", "0", "-", "-", "-", "-"]
    balanced = "balanced accuracy 0.700, the mean recall of the classes"
    assert lines[6].startswith("accuracy 0.857 (95 % interval 0.")
    assert lines[6].endswith(" of 14 images")
    assert lines[7].startswith("calibration error 0.")
    assert lines[8:] == [balanced, "without images white"]
    alike = evaluate_images(trained, make_folder(tmp_path / "alike"), show_progress=False)
    assert "balanced" not in alike.describe()


def test_one_class_is_enough_and_the_test_split_is_used(trained: TrainedModel, tmp_path: Path) -> None:
    make_image(tmp_path / "one" / "red" / "1.png", COLOURS["red"])
    evaluation = evaluate_images(trained, tmp_path / "one", show_progress=False)
    assert (evaluation.images, evaluation.accuracy) == (1, 1.0)
    assert evaluation.missing_classes == ("green", "blue", "pink", "white")
    for name, count in (("train", 4), ("val", 3), ("test", 2)):
        make_folder(tmp_path / "data" / name, per_class=count)
    evaluation = evaluate_images(trained, tmp_path / "data", show_progress=False)
    assert " of 6 images (test)" in evaluation.describe()
    assert _splits(evaluation, tmp_path / "out") == {"test"}
    shutil.rmtree(tmp_path / "data" / "test")
    assert _splits(evaluate_images(trained, tmp_path / "data", show_progress=False), tmp_path / "out") == {"validation"}
    table = tmp_path / "images.csv"
    for column, row in ((",split", ",test"), ("", "")):
        table.write_text(f"path,label{column}\none/red/1.png,green{row}\n")
        evaluation = evaluate_images(trained, table, show_progress=False)
        assert evaluation.confusion[1][0] == 1
        assert _splits(evaluation, tmp_path / "out") == {"test" if column else "all"}


def _splits(evaluation: Evaluation, folder: Path) -> set[str]:
    write_evaluation(evaluation, folder)
    return {row["split"] for row in csv.DictReader((folder / "predictions.csv").read_text().splitlines())}


def test_any_number_of_workers_gives_the_same_evaluation(trained: TrainedModel, tmp_path: Path) -> None:
    (make_folder(tmp_path, per_class=4) / "red" / "text.jpg").write_text("a text file")
    one, other = (
        evaluate_images(trained, tmp_path, batch_size=5, workers=workers, show_progress=False) for workers in (0, 2)
    )
    assert one == other
    assert (one.images, len(one.skipped_images)) == (12, 1)
    with pytest.raises(ValueError, match=r"workers\n +Input should be greater than or equal to 0 .*input_value=-1"):
        evaluate_images(trained, tmp_path, workers=-1)


def test_unreadable_images_are_left_out_and_listed(trained: TrainedModel, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, per_class=2)
    (folder / "red" / "text.jpg").write_text("a text file")
    (folder / "blue" / "1.png").write_bytes(b"")
    evaluation = evaluate_images(trained, folder, batch_size=2, show_progress=False)
    assert (evaluation.accuracy, evaluation.images) == (1.0, 5)
    assert [message.partition(":")[0] for message in evaluation.skipped_images] == [
        str(folder / "blue" / "1.png"),
        str(folder / "red" / "text.jpg"),
    ]
    assert "skipped 2 images that cannot be read" in evaluation.describe()


def test_folders_of_other_classes_raise_before_any_work(trained: TrainedModel, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    make_image(folder / "yellow" / "1.png", (200, 200, 0))
    with pytest.raises(
        ValueError, match=r"yellow: not a class of this model, whose classes are red, green, blue, pink"
    ):
        evaluate_images(trained, folder)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        evaluate_images(trained, tmp_path / "nowhere")


def test_a_folder_without_a_readable_image_raises(trained: TrainedModel, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of its 2 images can be read; the first: .*blue/1\.png"):
        evaluate_images(trained, tmp_path, show_progress=False)


def test_it_is_written_as_json_and_as_a_plot(trained: TrainedModel, tmp_path: Path) -> None:
    evaluation = evaluate_images(trained, make_folder(tmp_path / "images", per_class=2), show_progress=False)
    write_evaluation(evaluation, tmp_path / "out")
    write_evaluation(evaluation, tmp_path / "out")  # over an earlier one
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "confusion.png",
        "evaluation.json",
        "predictions.csv",
        "report.html",
    ]
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["accuracy"] == evaluation.accuracy == 1.0
    assert written["classes"][0] == {
        "name": "red", "support": 2, "predicted": 2, "correct": 2,
        "precision": 1.0, "recall": 1.0, "f1": 1.0, "auroc": 1.0,
    }  # fmt: skip
    assert written["confusion"][2] == [0, 0, 2, 0, 0]
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")
