"""The output folder: files are kept unless overwriting is requested, and a run leaves no temporary files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_folders import make_folder

from backbone_finetune import cli
from backbone_finetune.recipes.commands.runs.run_folder import (
    METRICS_FILE,
    MODEL_FILE,
    RESULTS,
    RUN_FILE,
    UNFINISHED,
    check_output_folder,
    finish_run,
    open_run,
    publishing,
)

Train = Callable[..., str]
RECORD = {"arguments": {"seed": 0, "phases": [{"epochs": 1}]}, "versions": {"torch": "2.9"}}
OTHER = {"arguments": {"seed": 0, "phases": [{"epochs": 2}]}, "versions": {"torch": "2.9"}}
FILES = {MODEL_FILE, RUN_FILE, METRICS_FILE, "curves.png", "report.html", "predictions.csv"}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"mine": name}))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def start(folder: Path, record: dict[str, Any] = RECORD, *, overwrite: bool = False, keep: str = "") -> bool:
    """Start or resume a run in a folder, and stop it; return whether it was resumed. It writes the file ``keep``."""
    with open_run(folder, record, overwrite=overwrite):
        resumed = (folder / UNFINISHED / "started").exists()
        put(folder / UNFINISHED, "started", *([keep] if keep else []))
    return resumed


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Train into a folder that must raise before any work without changing anything; return the message."""

    def run(output: Path, *options: str) -> str:
        before = tree(output)
        command = ["train", str(make_folder(tmp_path / "images")), "--model", "no such network", *options]
        assert cli.main([*command, "--output", str(output)]) == 2
        assert tree(output) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"backbone-finetune: error: {output} ")

    return run


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["metrics.json"], "metrics.json; pass --overwrite to replace it"),
        (["curves.png", "run.json"], "run.json, curves.png; pass --overwrite to replace them"),
        ([MODEL_FILE, "notes.txt"], f"{MODEL_FILE}; pass --overwrite to replace it"),
        ([f"{UNFINISHED}/thesis.txt"], f"{UNFINISHED}; pass --overwrite to replace it"),
    ],
)
def test_a_run_that_would_replace_files_raises(tmp_path: Path, refused: Train, names: list[str], said: str) -> None:
    put(tmp_path / "run", *names)
    assert refused(tmp_path / "run") == f"already holds {said}, or another folder with --output"


def test_other_files_are_never_changed(tmp_path: Path) -> None:
    put(tmp_path, "notes.txt", "checkpoints/best.safetensors", ".model.safetensors.123", MODEL_FILE)
    before = tree(tmp_path)
    start(tmp_path, overwrite=True)
    with open_run(tmp_path, RECORD, overwrite=False):
        with publishing(tmp_path, METRICS_FILE) as temporary:
            temporary.write_text("{}")
        finish_run(tmp_path, RESULTS)
    assert tree(tmp_path) == {**before, METRICS_FILE: b"{}"}


def test_overwriting_replaces_a_run_and_its_files(tmp_path: Path) -> None:
    put(tmp_path, MODEL_FILE, f"{UNFINISHED}/thesis.txt", f"{UNFINISHED}/checkpoints/step-1.safetensors")
    start(tmp_path, overwrite=True)
    assert set(tree(tmp_path / UNFINISHED)) == {"lock", "started", RUN_FILE}
    assert json.loads((tmp_path / UNFINISHED / RUN_FILE).read_text()) == RECORD
    assert json.loads((tmp_path / MODEL_FILE).read_text()) == {"mine": MODEL_FILE}


def test_a_link_in_an_unfinished_run_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path, "mine/step-000000001.safetensors")
    (tmp_path / "run" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "run" / UNFINISHED / "checkpoints").symlink_to(tmp_path / "mine")
    start(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / UNFINISHED / "checkpoints").exists()
    assert set(tree(tmp_path / "mine")) == {"step-000000001.safetensors"}


@pytest.mark.parametrize("names", [[], ["lock"], ["lock", f".{RUN_FILE}.123"]])
def test_a_run_that_was_killed_before_writing_its_record_starts_again(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / UNFINISHED).mkdir()
    put(tmp_path / UNFINISHED, *names)
    check_output_folder(tmp_path, overwrite=False)
    assert not start(tmp_path)
    assert start(tmp_path)


def test_an_unfinished_run_is_resumed_only_by_the_same_arguments(tmp_path: Path) -> None:
    assert not start(tmp_path, keep="checkpoints/one")
    assert start(tmp_path)
    assert start(tmp_path, overwrite=True)
    with pytest.raises(
        FileExistsError,
        match=r"holds an unfinished run with other arguments \(phases 1 epochs: 1 there, 2 here\); pass the same ones "
        "to resume it, --overwrite to replace it, or another folder with --output",
    ):
        start(tmp_path, OTHER)
    assert (tmp_path / UNFINISHED / "checkpoints" / "one").exists()
    assert not start(tmp_path, OTHER, overwrite=True)
    assert not (tmp_path / UNFINISHED / "checkpoints").exists()


def test_a_damaged_record_counts_as_another_run(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / UNFINISHED / RUN_FILE).write_text("{")
    with pytest.raises(FileExistsError, match="holds an unfinished run with other arguments"):
        start(tmp_path)


def test_a_run_that_replaces_a_finished_one_can_be_resumed(tmp_path: Path) -> None:
    put(tmp_path, MODEL_FILE, RUN_FILE)
    with pytest.raises(FileExistsError, match=r"already holds run.json, model.safetensors; pass --overwrite"):
        start(tmp_path)
    assert not start(tmp_path, overwrite=True)
    assert start(tmp_path)
    assert json.loads((tmp_path / MODEL_FILE).read_text()) == {"mine": MODEL_FILE}


def test_a_second_process_raises_while_one_trains(tmp_path: Path) -> None:
    with open_run(tmp_path, RECORD, overwrite=False):
        before = tree(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match=r"another process is training in .*; wait for it or stop it"):
                start(tmp_path, overwrite=overwrite)
        assert tree(tmp_path) == before
    start(tmp_path)


def test_a_read_only_folder_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"file is a file; pass a folder with --output"):
        start(tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"file is a file; pass a folder with --output"):
        start(tmp_path / "file" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match=r"link is a broken link; pass a folder with --output"):
        check_output_folder(tmp_path / "link", overwrite=True)


def test_an_incomplete_result_never_replaces_a_complete_one(tmp_path: Path) -> None:
    put(tmp_path, METRICS_FILE)

    def write_half() -> None:
        with publishing(tmp_path, METRICS_FILE) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("no space left")

    with open_run(tmp_path, RECORD, overwrite=True):
        with pytest.raises(RuntimeError, match="no space left"):
            write_half()
        assert json.loads((tmp_path / METRICS_FILE).read_text()) == {"mine": METRICS_FILE}
        finish_run(tmp_path, [METRICS_FILE])
    assert set(tree(tmp_path)) == {METRICS_FILE}


@pytest.mark.parametrize("name", [MODEL_FILE, METRICS_FILE])
def test_a_run_that_is_killed_while_writing_a_result_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class KilledError(Exception):
        """Like SIGKILL, after which nothing is cleaned up."""

    def die(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "run" / name:
            raise KilledError
        move(source, target)

    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1"]
    command += ["--output", str(tmp_path / "run")]
    move = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KilledError):
            cli.main(command)
    assert (tmp_path / "run" / MODEL_FILE).exists() == (name != MODEL_FILE)
    assert cli.main(command) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
