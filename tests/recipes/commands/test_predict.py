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
from typing import Any

import pytest
import timm
import torch
from image_folders import make_image
from packed_images import write_tar
from PIL import Image
from torch import Tensor, nn

from backbone_finetune import FineTuneModel
from backbone_finetune.cli import main
from backbone_finetune.recipes import (
    MultiLabel,
    Regression,
    SingleLabel,
    TrainedModel,
    predict,
    save_trained_model,
)
from backbone_finetune.recipes.commands.predict import Prediction, list_inputs
from backbone_finetune.recipes.commands.prediction_files import choose_writer, write_csv, write_jsonl, write_parquet
from backbone_finetune.recipes.data.sources.packed import PackedPath
from backbone_finetune.recipes.models.named import NamedModel
from backbone_finetune.recipes.objectives.objective import Objective

Write = Callable[[Iterable[Prediction], Path], Iterator[Prediction]]
PREDICTIONS = (Prediction(Path("tom.jpg"), (("cat", 0.75),)), Prediction(Path("text.jpg"), error="not an image"))
NAMED = NamedModel(nn.Identity(), ("cat", "dog"), {})
WRITERS = pytest.mark.parametrize("write", [partial(write_csv, top_k=1, trained=NAMED), write_jsonl])


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
    list(write_csv(write_jsonl(predictions, tmp_path / "a.jsonl"), tmp_path / "a.csv", 1, NAMED))
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


def make_trained(folder: Path, objective: Objective | None = None, images: int = 3) -> tuple[TrainedModel, list[Path]]:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    trained = TrainedModel(model, "test_resnet", ("class_1", "b", "c"), config, objective=objective or SingleLabel())
    paths = [make_image(folder / f"{index}.png", (index, 0, 0)) for index in range(images)]
    return trained, paths


@pytest.mark.clients
@pytest.mark.parametrize("objective", [SingleLabel(), MultiLabel((0.0, 0.5, 1.0)), Regression()])
def test_parquet_has_the_cells_of_csv_with_types(objective: Objective, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    trained, paths = make_trained(tmp_path, objective)
    paths += [tmp_path / "gone.png", tmp_path / os.fsdecode(b"\xff.png")]
    predictions = 201 * [*predict(trained, paths, top_k=2)]  # more than are written at once
    files = tmp_path / "a.csv", tmp_path / "a.parquet"
    for file in files:
        assert [*choose_writer(file, 2, trained)(predictions)] == predictions
    with files[0].open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    table = parquet.read_table(files[1])
    assert table.column_names == [*rows[0]]
    for row, cells in zip(rows, table.to_pylist(), strict=True):
        for name, cell in cells.items():
            texts = ";".join(map(str, cell)) if isinstance(cell, list) else "" if cell is None else str(cell)
            assert texts == row[name]
    assert len(rows) == table.num_rows == 1005
    assert table["error"].null_count == 603
    kinds = {SingleLabel: "double", MultiLabel: "list<element: double>", Regression: "double"}
    assert str(table.schema.field(2).type) == kinds[type(objective)]
    [*write_parquet((), files[1], 2, trained)]
    assert parquet.read_table(files[1]).num_rows == 0


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_predictions_are_written_while_images_are_read(suffix: str, tmp_path: Path) -> None:
    read: list[Path] = []
    trained, paths = make_trained(tmp_path, images=12)

    def open_image(path: Path) -> bytes:
        read.append(path)
        return path.read_bytes()

    images = [PackedPath(path).holding(partial(open_image, path)) for path in paths]
    predictions = predict(trained, images, batch_size=2, workers=0)
    written = choose_writer(tmp_path / f"answers{suffix}", 1, trained)(predictions)
    for count, _ in enumerate(written, start=1):
        assert len(read) <= count + 3  # this batch and the next
    assert count == len(read) == 12


def test_workers_read_the_images_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = make_trained(tmp_path / "images", images=12)
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    open_image = Image.open

    def note_process(*arguments: Any, **others: Any) -> Image.Image:
        (tmp_path / f"{os.getpid()}.process").touch()
        return open_image(*arguments, **others)

    monkeypatch.setattr(Image, "open", note_process)  # workers are forks of this process

    def run(workers: int) -> tuple[bytes, set[int]]:
        arguments = ["predict", "model.safetensors", "images", "--batch-size", "4", "--output", "answers.csv"]
        assert main([*arguments, "--workers", str(workers)]) == 0
        processes = {int(path.stem) for path in tmp_path.glob("*.process")}
        for path in tmp_path.glob("*.process"):
            path.unlink()
        return (tmp_path / "answers.csv").read_bytes(), processes

    (rows, processes), (same_rows, others) = run(0), run(2)
    assert rows == same_rows
    assert processes == {os.getpid()}
    assert len(others) == 2
    assert os.getpid() not in others


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_progress(terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = make_trained(tmp_path / "images")
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    assert main(["predict", "model.safetensors", "images", "--output", "answers.csv"]) == 0
    assert ("predicting" in shown.getvalue()) == terminal


def test_a_file_of_predictions_that_needs_an_extra_is_refused_before_the_first_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyarrow is not installed; run: pip install .*\[parquet\]"):
        choose_writer(tmp_path / "answers.parquet", 1, NAMED)
    with pytest.raises(ValueError, match=r"answers\.txt: .* ends in \.csv, \.jsonl or \.parquet"):
        choose_writer(tmp_path / "answers.txt", 1, NAMED)


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


def test_convolutions_run_in_channels_last(tmp_path: Path) -> None:
    """EfficientNet-Lite0 takes .6 of the time."""
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    trained = TrainedModel(model, "test_resnet", ("a", "b", "c"), timm.data.resolve_model_data_config(model))
    Image.effect_noise((160, 160), 80).convert("RGB").save(tmp_path / "image.png")
    formats: list[bool] = []
    model.backbone.register_forward_pre_hook(
        lambda _, inputs: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    (answer,) = predict(trained, [tmp_path / "image.png"])
    assert answer.error is None
    assert formats == [True]


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


def test_all_images_in_a_tar_file_are_listed_with_or_without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["b.png", "train/red/0.png", "a.png", "train/red/0.txt", "test/0.PNG", "a.npy", ".hidden.png", "alone.npy"]
    tar = write_tar(tmp_path / "images.tar", dict.fromkeys(names, b""))
    expected = [tar / name for name in ("a.png", "alone.npy", "b.png", "test/0.PNG", "train/red/0.png")]
    found = list_inputs([str(tar)])
    assert found == expected
    assert all(path.is_file() for path in found)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"images.tar\n")))
    for given in (["images.tar"], ["*.tar"], ["-"], ["."]):
        assert list_inputs(given) == [path.relative_to(tmp_path) for path in expected]
    for name in ("val", "test"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": b""})
    of_all = [*map(Path, [*(path.relative_to(tmp_path) for path in expected), "test.tar/1.png", "val.tar/1.png"])]
    assert list_inputs(["."]) == of_all
    assert not caplog.messages
    make_image(tmp_path / "deep" / "beside.png", (0, 0, 0))
    assert list_inputs(["."]) == [Path("deep/beside.png"), *of_all]


def test_what_has_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "empty.tar", {})
    write_tar(tmp_path / "texts.tar", {"a.txt": b""})
    for name in ("empty", "empty.tar", "texts.tar"):
        with pytest.raises(ValueError, match=rf"{name}: no image in it \(\.jpg, \.png"):
            list_inputs([str(tmp_path / name)])
    with pytest.raises(FileNotFoundError, match=r"gone\.tar: there is no such tar file"):
        list_inputs([str(tmp_path / "gone.tar")])


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
