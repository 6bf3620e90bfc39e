"""The same images from a folder, tables, tar files and datasets give the same model, and `evaluate` takes each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from image_folders import COLOURS, make_image
from packed_images import read_files, sample, write_tar
from safetensors.torch import load_file

from backbone_finetune.cli import main

NAMES = ("blue", "red")
OPTIONS = "--model test_resnet --epochs 1 --lr 0.01 --device cpu --mixed-precision no --seed 3"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write eight images: four of each of two classes."""
    root = tmp_path_factory.mktemp("images")
    for name in NAMES:
        for index in range(4):
            make_image(root / "folder" / name / f"{index}.png", COLOURS[name], seed=index)
    return root


def images_of(root: Path) -> list[tuple[str, Path]]:
    return [(path.parent.name, path) for path in sorted((root / "folder").rglob("*.png"))]


def run(source: object, output: Path, *options: str) -> Path:
    assert main(["train", str(source), *OPTIONS.split(), *options, "--output", str(output)]) == 0
    return output / "model.safetensors"


@pytest.fixture(scope="module")
def expected(root: Path) -> Path:
    """Train on the folder."""
    return run(root / "folder", root / "run")


def write_csv(root: Path) -> Path:
    rows = [f"folder/{label}/{path.name},{label}" for label, path in reversed(images_of(root))]
    (root / "table.csv").write_text("\n".join(["path,label", *sorted(rows)]))
    return root / "table.csv"


def write_tar_of_folders(root: Path) -> Path:
    return write_tar(root / "folders.tar", read_files(root / "folder", "images/"))


def write_webdataset(root: Path) -> Path:
    for shard in range(2):
        files: dict[str, bytes] = {}
        for index, (label, path) in list(enumerate(images_of(root)))[4 * shard : 4 * shard + 4]:
            files |= sample(f"{index:04}", path.read_bytes(), cls=label)
        write_tar(root / f"shard-{shard:03}.tar", files)
    return root / "shard-{000..001}.tar"


def write_parquet(root: Path) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"path": [str(path) for _, path in images_of(root)], "label": [label for label, _ in images_of(root)]}
    parquet.write_table(pyarrow.table(columns), root / "table.parquet")
    return root / "table.parquet"


def write_dataset(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    labels = datasets.ClassLabel(names=list(reversed(NAMES)))
    cells = {
        "image": [str(path) for _, path in images_of(root)],
        "label": [labels.str2int(label) for label, _ in images_of(root)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    datasets.Dataset.from_dict(cells, features=features).save_to_disk(root / "dataset")
    return root / "dataset"


@pytest.mark.parametrize(
    "write",
    [
        write_csv,
        write_tar_of_folders,
        write_webdataset,
        pytest.param(write_parquet, marks=pytest.mark.clients),
        pytest.param(write_dataset, marks=pytest.mark.clients),
    ],
)
def test_the_same_images_give_the_same_model(
    root: Path, expected: Path, tmp_path: Path, write: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(root)
    model = run(source, tmp_path / "run", "--workers", "1")
    tensors, wanted = load_file(model), load_file(expected)
    assert tensors.keys() == wanted.keys()
    assert all(tensors[name].equal(wanted[name]) for name in wanted)
    metrics = [json.loads((each.parent / "metrics.json").read_text()) for each in (model, expected)]
    assert len({metric["test_accuracy"] for metric in metrics}) == 1
    assert (model.parent / "report.html").read_text().count("data:image/jpeg") == (
        (expected.parent / "report.html").read_text().count("data:image/jpeg")
    )
    capsys.readouterr()
    assert main(["evaluate", str(model), str(source), "--output", str(tmp_path / "evaluation")]) == 0
    assert "of 8 images" in capsys.readouterr().out
    folder = root / "folder" if source.suffix in {".csv", ".parquet"} else source.parent
    listed = []
    for output in (model.parent, tmp_path / "evaluation"):
        with (output / "predictions.csv").open(newline="") as file:
            listed.append({row["image"]: row["class"] for row in csv.DictReader(file)})
    assert [len(rows) for rows in listed] == [2, 8]
    assert listed[0].items() <= listed[1].items()
    assert all(name.startswith(str(folder)) for name in listed[1])


def test_groups_of_a_table(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{path},{label},patient {path.stem}" for label, path in images_of(root)]
    (root / "patients.csv").write_text("\n".join(["path,label,patient", *rows]))
    run(root / "patients.csv", tmp_path / "run", "--group", "patient", "--folds", "3")
    printed = capsys.readouterr()
    assert "test: 2 images from" in printed.out
    assert "30 % of each class, by groups, held out" in printed.out
    assert len(json.loads((tmp_path / "run" / "metrics.json").read_text())["fold_accuracies"]) == 3
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["group"] == "patient"
    again = ["train", str(root / "patients.csv"), *OPTIONS.split(), "--group", "patient", "--folds", "4"]
    assert main([*again, "--output", str(tmp_path / "more")]) == 2
    assert "folds = 4: expected at most 3, the groups of the training images" in capsys.readouterr().err


def test_broken_members_are_skipped_and_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = read_files(root / "folder")
    files["red/broken.png"] = b"no image"
    tar = write_tar(tmp_path / "images.tar", files)
    run(tar, tmp_path / "run")
    assert f"skipped: {tar}/red/broken.png: not a readable image" in capsys.readouterr().err
    (skipped,) = json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_images"]
    assert skipped.startswith(f"{tar}/red/broken.png: ")


def test_a_run_whose_test_images_are_all_broken_leaves_its_model(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "0.png").touch()
    model = run(root / "folder", tmp_path / "run", "--test", str(tmp_path / "test"))
    assert "test images: left out, test: none of the images can be read" in capsys.readouterr().err
    assert model.is_file()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["chance"] is None
