"""Files of predictions are written completely or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import TrainedModel, predict
from backbone_finetune.recipes.commands.predict import Prediction, list_inputs, write_csv, write_jsonl

Write = Callable[[Iterable[Prediction], Path], Iterator[Prediction]]
PREDICTIONS = (Prediction(Path("tom.jpg"), (("cat", 0.75),)), Prediction(Path("text.jpg"), error="not an image"))
WRITERS = pytest.mark.parametrize("write", [partial(write_csv, top_k=1), write_jsonl])


@WRITERS
def test_writers_yield_the_predictions(write: Write, tmp_path: Path) -> None:
    assert tuple(write(PREDICTIONS, tmp_path / "answers")) == PREDICTIONS


@WRITERS
def test_an_existing_file_is_kept_until_the_last_prediction(write: Write, tmp_path: Path) -> None:
    (tmp_path / "answers").write_text("earlier")
    written = write(PREDICTIONS, tmp_path / "answers")
    next(written)
    written.close()  # type: ignore[attr-defined]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("answers", "earlier")]


@pytest.mark.parametrize("predictions", [(), PREDICTIONS])
def test_written_files_can_be_read(predictions: tuple[Prediction, ...], tmp_path: Path) -> None:
    list(write_csv(write_jsonl(predictions, tmp_path / "a.jsonl"), tmp_path / "a.csv", top_k=1))
    expected = [
        {"image": "tom.jpg", "classes": [{"name": "cat", "probability": 0.75}], "error": None},
        {"image": "text.jpg", "classes": [], "error": "not an image"},
    ]
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert entries == expected[: len(predictions)]
    rows = [
        {"image": "tom.jpg", "class_1": "cat", "probability_1": "0.75", "error": ""},
        {"image": "text.jpg", "class_1": "", "probability_1": "", "error": "not an image"},
    ]
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows[: len(predictions)]


def test_tta_averages_an_image_and_its_mirror_image(tmp_path: Path) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    trained = TrainedModel(model, "test_resnet", ("a", "b", "c"), timm.data.resolve_model_data_config(model))
    image = Image.effect_noise((160, 160), 80).convert("RGB")
    image.save(tmp_path / "image.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    paths = [tmp_path / "image.png", tmp_path / "mirrored.png"]

    def probabilities(tta: bool) -> list[Tensor]:
        answers = predict(trained, paths, top_k=3, tta=tta)
        return [torch.tensor([value for _, value in sorted(answer.classes)]) for answer in answers]

    one, other = probabilities(tta=False)
    for averaged in probabilities(tta=True):
        torch.testing.assert_close(averaged, (one + other) / 2)
    assert not torch.allclose(one, other)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/b/2.png", "3.png", "4.txt"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def test_images_are_given_as_paths_folders_and_patterns(images: Path) -> None:
    def found(*given: str) -> list[str]:
        return [str(path.relative_to(images)) for path in list_inputs([str(images / name) for name in given])]

    assert found("a") == ["a/1.png", "a/b/2.png"]
    assert found("*.png", "a/*") == ["3.png", "a/1.png", "a/b/2.png"]
    assert found("**/[ab3]*") == ["3.png"]
    assert found("**/*.png") == ["3.png", "a/1.png", "a/b/2.png"]
    (images / "[x].png").touch()
    assert found("[x].png") == ["[x].png"]
    with pytest.raises(ValueError, match=r"\*\.jpg: no file matches this pattern"):
        found("*.jpg")


def test_paths_come_from_stdin_one_per_line(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(lines: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))

    give(b"one.png\n\nwith space.png \r\n%s\nc\xff.png" % os.fsencode(images / "a"))
    assert list_inputs(["first.png", "-"]) == [
        *map(Path, ("first.png", "one.png", "with space.png ")),
        *(images / "a" / name for name in ("1.png", "b/2.png")),
        Path(os.fsdecode(b"c\xff.png")),
    ]
    give(b"\n")
    with pytest.raises(ValueError, match="stdin holds no path of an image"):
        list_inputs(["-"])
