"""Exported files appear only after their logits are compared with the model's, and never replace a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from exported_models import make_trained, names_in
from image_folders import COLOURS, make_image
from torch import Tensor

from backbone_finetune.recipes.export.checks import Comparison, staging


def test_other_logits_are_refused() -> None:
    comparison = Comparison(make_trained(), [])
    exported = comparison.prove(comparison.network, Path("model"), use="")
    assert (exported.difference, exported.images) == (0, 0)
    assert exported.largest > 1
    with pytest.raises(ValueError, match=r"model: the exported model has different logits: .* nothing was written"):
        comparison.prove(lambda batch: comparison.network(batch) * 1.01, Path("model"), use="")


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_batch_and_an_input_alone_are_both_compared(wrong: int) -> None:
    comparison = Comparison(make_trained(), [])

    def run(batch: Tensor) -> Tensor:
        return comparison.network(batch) + (1 if len(batch) == wrong else 0)

    with pytest.raises(ValueError, match="different logits"):
        comparison.prove(run, Path("model"), use="")


def test_at_most_sixteen_images_are_compared_evenly_spread(tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{index}.png", COLOURS["red"], seed=index) for index in range(17)]
    comparison = Comparison(make_trained(), images)
    assert comparison.images == len(comparison.inputs) == 9
    assert Comparison(make_trained(), images[:16]).images == 16
    images[0].write_text("no image")
    with pytest.raises(ValueError, match=r"0\.png: not a readable image"):
        Comparison(make_trained(), images)


def test_nothing_is_left_when_the_export_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with staging(tmp_path / "model.onnx") as path:
            path.write_text("half a model")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names_in(tmp_path) == []


def write_two(path: Path) -> None:
    with staging(path, ".xml") as temporary:
        temporary.touch(mode=0o600)
        temporary.with_suffix(".bin").touch()


def test_files_appear_together_with_the_usual_permissions(tmp_path: Path) -> None:
    write_two(tmp_path / "new" / "model.xml")
    assert names_in(tmp_path / "new") == ["model.bin", "model.xml"]
    (tmp_path / "other").touch()
    assert (tmp_path / "new" / "model.xml").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
def test_an_existing_file_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("the user's")
    with pytest.raises(FileExistsError, match=f"{name} exists already; remove it"):
        write_two(tmp_path / "model.xml")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "the user's")]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.bin: the file name must end in \.xml"):
        write_two(tmp_path / "model.bin")
