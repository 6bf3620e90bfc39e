"""Training images whose class looks wrong, and identical images: found, listed and shown."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from image_folders import COLOURS, make_folder, make_image

from backbone_finetune.cli import main

SMALL = ["--model", "test_resnet", "--epochs", "3", "--lr", "0.05", "--batch-size", "8", "--device", "cpu"]


@pytest.mark.clients
@pytest.mark.parametrize("more", [[], ["--views", "2", "--folds", "3", "--epochs", "8"]])
def test_wrong_classes_are_listed_first(tmp_path: Path, more: list[str]) -> None:
    pytest.importorskip("cleanlab")
    data = make_folder(tmp_path / "data" / "train", per_class=12)
    make_folder(tmp_path / "data" / "test", per_class=2)
    wrong = {
        str(make_image(data / given / f"wrong {right}.png", COLOURS[right], seed=99)): (given, right)
        for given, right in (("red", "green"), ("green", "blue"))
    }
    (data / "red" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "run"
    assert main(["train", str(tmp_path / "data"), *SMALL, *more, "--check-labels", "--output", str(output)]) == 0
    rows = list(csv.DictReader((output / "label_issues.csv").read_text().splitlines()))
    assert {row["image"]: (row["class"], row["suggested"]) for row in rows[:2]} == wrong
    assert [float(row["score"]) for row in rows] == sorted(float(row["score"]) for row in rows)
    assert float(rows[0]["score"]) < 0.5
    assert json.loads((output / "metrics.json").read_text())["label_issues"] == len(rows)
    page = (output / "report.html").read_text()
    section = page[page.index("<h2>Training images whose label may be wrong") : page.index("<h2>Identical images")]
    assert f"({len(rows)} in all)" in section
    assert "many of them are right, and only hard" in section
    assert section.count("<figure>") == len(rows)
    assert (
        f"<bdi>{rows[0]['class']}</bdi> {float(rows[0]['score']):.0%}, looks like <bdi>{rows[0]['suggested']}</bdi>"
        in section
    )


def test_checking_labels_needs_cleanlab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    folder, output = str(make_folder(tmp_path / "images")), tmp_path / "run"
    assert main(["train", folder, *SMALL, "--check-labels", "--output", str(output)]) == 2
    assert "cleanlab is not installed; run: pip install 'backbone-finetune[labels]'" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.clients
def test_wrong_labels_of_several_are_listed_first(tmp_path: Path) -> None:
    pytest.importorskip("cleanlab")
    folder = make_folder(tmp_path / "images", per_class=12)
    labels = {path: path.parent.name for path in sorted(folder.rglob("*.png"))}
    wrong = folder / "red" / "5.png"
    labels[wrong] = "green;blue"
    rows = [f"{path},{given},{'test' if path.name == '0.png' else 'train'}" for path, given in labels.items()]
    (tmp_path / "table.csv").write_text("\n".join(["path,labels,split", *rows]))
    output = tmp_path / "run"
    assert main(["train", str(tmp_path / "table.csv"), *SMALL, "--check-labels", "--output", str(output)]) == 0
    first, *_ = csv.DictReader((output / "label_issues.csv").read_text().splitlines())
    assert (first["image"], first["class"], first["suggested"]) == (str(wrong), "blue; green", "red")
    assert "blue; green" in (output / "report.html").read_text()


def test_values_have_no_labels_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "images")
    lines = [f"{path},{index}" for index, path in enumerate(sorted(folder.rglob("*.png")))]
    (tmp_path / "table.csv").write_text("\n".join(["path,age", *lines]))
    assert main(["train", str(tmp_path / "table.csv"), *SMALL, "--regression", "age", "--check-labels"]) == 2
    assert "check_labels is for classes and labels" in capsys.readouterr().err


def test_identical_images_are_in_the_report_and_the_metrics(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "test"):
        make_folder(data / part, per_class=4)  # the same images
    make_image(data / "train" / "red" / "copy.png", COLOURS["blue"], seed=3)
    output = tmp_path / "run"
    assert main(["train", str(data), *SMALL, "--output", str(output)]) == 0
    copies = json.loads((output / "metrics.json").read_text())["copies"]
    assert len(copies) == 1 + 12
    assert copies[0] == {
        "path": str(data / "train" / "red" / "copy.png"),
        "part": "train",
        "label": "red",
        "of_path": str(data / "train" / "blue" / "3.png"),
        "of_part": "train",
        "of_label": "blue",
    }
    assert {copy["part"] for copy in copies[1:]} == {"test"}
    page = (output / "report.html").read_text()
    section = page[page.index("<h2>Identical images in two parts or two classes (13 in all)") :]
    assert section.count("<figure>") == 2 * 13
    assert "<figcaption>train <bdi>red</bdi><br><bdi>copy.png</bdi></figcaption>" in section


def test_results_of_the_replaced_run_do_not_stay(tmp_path: Path) -> None:
    output, folder = tmp_path / "run", str(make_folder(tmp_path / "images"))
    output.mkdir()
    (output / "label_issues.csv").write_text("of an earlier run")
    (output / "notes.txt").write_text("mine")
    assert main(["train", folder, *SMALL, "--output", str(output)]) == 2
    assert main(["train", folder, *SMALL, "--output", str(output), "--overwrite"]) == 0
    assert not (output / "label_issues.csv").exists()
    assert (output / "notes.txt").exists()
