"""Names that are not valid text, or not in the terminal's encoding: escaped in output, unchanged in files."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from image_folders import COLOURS, make_image

from backbone_finetune import cli
from backbone_finetune.recipes.models.file import load_outline

RAW = os.fsdecode(b"c\xff")
NAMES = ("Größe", RAW)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two classes with such names, trained on a folder with such a name."""
    folder = tmp_path_factory.mktemp("trained")
    for name, colour in zip(NAMES, COLOURS.values(), strict=False):
        for index in range(4):
            make_image(folder / "images" / name / os.fsdecode(b"n\xff%d.png" % index), colour, seed=index)
    output = folder / "run"
    arguments = ["train", str(folder / "images"), "--model", "test_resnet", "--epochs", "1", "--output", str(output)]
    assert cli.main(arguments) == 0
    return output / "model.safetensors"


ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])


def print_strictly(encoding: str, *arguments: object) -> bytes:
    """Run a command with a strict stdout encoding, as with PYTHONIOENCODING=...:strict; return what it wrote."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    with redirect_stdout(stream):
        assert cli.main([str(argument) for argument in arguments]) == 0
    return stream.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


@ENCODINGS
def test_predict_prints_a_line_for_every_image(trained: Path, tmp_path: Path, encoding: str) -> None:
    images = trained.parents[1] / "images"
    lines = print_strictly(encoding, "predict", trained, images).splitlines()
    assert len(lines) == 8
    assert all(rb"n\udcff" in line and rb"c\udcff " in line for line in lines)
    expected = sorted(images.rglob("*.png"))
    for name in ("a.csv", "a.jsonl"):
        print_strictly(encoding, "predict", trained, images, "--output", tmp_path / name)
    rows = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()[1:]
    escaped, classes = (
        [str(name).encode(errors="backslashreplace").decode() for name in names] for names in (expected, NAMES)
    )
    assert [row.split(",")[0] for row in rows] == escaped
    assert all({row.split(",")[1], row.split(",")[3]} == set(classes) for row in rows)
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [Path(entry["image"]) for entry in entries] == expected
    assert all({found["name"] for found in entry["classes"]} == set(NAMES) for entry in entries)


@ENCODINGS
def test_evaluate_and_inspect_take_the_model(trained: Path, tmp_path: Path, encoding: str) -> None:
    images, output = trained.parents[1] / "images", tmp_path / "out"
    assert rb"c\udcff " in print_strictly(encoding, "evaluate", trained, images, "--output", output)
    assert [score["name"] for score in json.loads((output / "evaluation.json").read_text())["classes"]] == list(NAMES)
    assert (output / "confusion.png").stat().st_size > 1000
    assert rb"c\udcff)" in print_strictly(encoding, "inspect", trained)


def test_the_model_file_has_the_names(trained: Path) -> None:
    assert load_outline(trained)[0].class_names == NAMES


def test_an_error_is_printed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    assert cli.main(["predict", RAW, "tom.jpg"]) == 2
    sys.stderr.flush()
    assert written.getvalue().startswith(rb"backbone-finetune: error: c\udcff: no such file")
