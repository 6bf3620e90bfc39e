"""The output folder: what is not a run's stays as it is, what a run writes there is known, and nothing is left over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from image_folders import make_folder

from backbone_finetune import cli
from backbone_finetune.recipes.commands import setup as task_module
from backbone_finetune.recipes.commands import train as run_module
from backbone_finetune.recipes.commands.run_folder import (
    MODEL_FILE,
    RUN_FILE,
    UNFINISHED,
    check_output_folder,
    claim_output_folder,
    clear,
    find_others,
    remove_leftover,
)
from backbone_finetune.recipes.commands.timing import BackwardTimes

Train = Callable[..., str]
RECORD = {"arguments": {"seed": 0}, "versions": {"torch": "2.9"}}
THESIS = f"{UNFINISHED}/chapter1/thesis.txt"


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"mine": name}))


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run a training into a folder that is refused before any work, with nothing touched: gives what it says of it."""

    def run(output: Path, *options: str) -> str:
        before = tree(output)
        assert cli.main(["train", str(make_folder(tmp_path / "images")), *options, "--output", str(output)]) == 2
        assert tree(output) == before
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix(f"backbone-finetune: error: {output} ")

    monkeypatch.setattr(task_module, "load_network", lambda *_, **__: pytest.fail("work was done"))
    return run


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["metrics.json"], "metrics.json"),
        (["curves.png", "run.json"], "run.json, curves.png"),
        ([MODEL_FILE, "metrics.json"], f"metrics.json, {MODEL_FILE}"),
        ([f"{UNFINISHED}/checkpoints/step-000000001.safetensors"], "unfinished/"),
    ],
)
def test_the_names_of_a_run_are_refused_where_none_was_begun(
    tmp_path: Path, refused: Train, names: list[str], said: str
) -> None:
    put(tmp_path / "run", *names)
    assert refused(tmp_path / "run") == (
        f"holds {said}, and no run was begun there (no run.json of one); pass another folder with --output, or "
        "--overwrite to replace them"
    )


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([THESIS, "metrics.json"], "unfinished/chapter1/, unfinished/chapter1/thesis.txt"),
        ([f"{UNFINISHED}/checkpoints/best.safetensors"], "unfinished/checkpoints/best.safetensors"),
        ([f"{UNFINISHED}/features-train/slot-x.bin"], "unfinished/features-train/slot-x.bin"),
        ([f"{UNFINISHED}/{name}" for name in "abcd"], "unfinished/a, unfinished/b, unfinished/c and 1 more"),
        ([UNFINISHED], "unfinished"),
        (["metrics.json/mine.txt"], "metrics.json/"),
    ],
)
def test_what_no_run_writes_is_refused_even_to_overwrite(
    tmp_path: Path, refused: Train, names: list[str], said: str, options: tuple[str, ...]
) -> None:
    put(tmp_path / "run", *names)
    assert refused(tmp_path / "run", *options) == (
        f"holds what no run writes there and none deletes ({said}); move it away, or pass another folder with --output"
    )


def test_a_refused_run_leaves_what_is_beside_a_finished_model(tmp_path: Path, refused: Train) -> None:
    put(tmp_path / "copied", MODEL_FILE, THESIS)
    assert "chapter1/thesis.txt); move it away" in refused(tmp_path / "copied")
    put(tmp_path / "checkpoints", MODEL_FILE, f"{UNFINISHED}/checkpoints/step-000000001.safetensors")
    assert f"holds {MODEL_FILE}, unfinished/, and no run was begun" in refused(tmp_path / "checkpoints")
    claim_output_folder(tmp_path / "own", RECORD, overwrite=False)
    put(tmp_path / "own", MODEL_FILE, THESIS, f"{UNFINISHED}/checkpoints/step-000000001.safetensors")
    assert "chapter1/thesis.txt); move it away" in refused(tmp_path / "own")


def test_a_link_among_what_a_run_keeps_is_not_followed(tmp_path: Path, refused: Train) -> None:
    put(tmp_path, "mine/step-000000001.safetensors")
    (tmp_path / "run" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "run" / UNFINISHED / "checkpoints").symlink_to(tmp_path / "mine")
    assert "(unfinished/checkpoints/)" in refused(tmp_path / "run", "--overwrite")
    clear(tmp_path / "run" / UNFINISHED)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / UNFINISHED).symlink_to(tmp_path / "mine")
    assert "(unfinished)" in refused(tmp_path / "linked", "--overwrite")
    assert tree(tmp_path / "mine") == {"step-000000001.safetensors": b'{"mine": "mine/step-000000001.safetensors"}'}


@pytest.mark.parametrize(
    "names",
    [
        [],
        [f"{UNFINISHED}/"],
        [f"{UNFINISHED}/lock"],
        [f"{UNFINISHED}/lock", f"{UNFINISHED}/.replaces.123", ".run.json.123"],
        [f"{UNFINISHED}/lock", f"{UNFINISHED}/replaces", ".run.json.123"],
    ],
)
def test_a_run_that_was_killed_before_it_said_what_it_is_goes_on(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / UNFINISHED).mkdir(exist_ok=True)
        if not name.endswith("/"):
            put(tmp_path, name)
    check_output_folder(tmp_path, overwrite=False)
    assert not claim_output_folder(tmp_path, RECORD, overwrite=False)
    assert claim_output_folder(tmp_path, RECORD, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_run_had_begun_to_write_goes(tmp_path: Path, overwrite: bool) -> None:
    claim_output_folder(tmp_path, RECORD, overwrite=False)
    put(tmp_path, *(f".{name}.4194301" for name in (MODEL_FILE, "metrics.json", "curves.png", RUN_FILE)))
    mine = {".model.safetensors.bak", f"{MODEL_FILE}.123", ".notes.txt.123", ".modelXsafetensors.123"}
    put(tmp_path, *mine, f".{MODEL_FILE}.5/mine.txt")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="an unfinished run of other arguments"):
        claim_output_folder(tmp_path, {**RECORD, "arguments": {"seed": 1}}, overwrite=False)
    assert tree(tmp_path) == before
    record = {**RECORD, "arguments": {"seed": int(overwrite)}}
    assert claim_output_folder(tmp_path, record, overwrite=overwrite) != overwrite
    assert {path.name for path in tmp_path.iterdir()} == {RUN_FILE, UNFINISHED, f".{MODEL_FILE}.5", *mine}


def test_a_model_that_was_killed_in_its_last_moment_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        """In the place of SIGKILL, after which nothing is removed."""

    def die(source: Path, target: Path) -> None:
        if Path(target).name == MODEL_FILE:
            Path(source).with_suffix(".4194301").write_bytes(Path(source).read_bytes())  # of a process that is gone
            raise KilledError
        move(source, target)

    times = BackwardTimes(unfrozen=100.0, frozen=1.0, classifier_alone=0.5, batch_size=8)
    monkeypatch.setattr(run_module, "measure_backward", lambda *arguments: times)
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--epochs", "1"]
    command += ["--output", str(tmp_path / "run")]
    move = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KilledError):
            cli.main(command)
    assert (tmp_path / "run" / f".{MODEL_FILE}.4194301").exists()
    assert cli.main(command) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {MODEL_FILE, RUN_FILE, "metrics.json", "curves.png"}


def test_overwriting_replaces_the_names_of_a_run(tmp_path: Path) -> None:
    kept = f"{UNFINISHED}/checkpoints/step-000000001.safetensors"
    put(tmp_path, "metrics.json", "notes.txt", RUN_FILE, kept)
    remove_leftover(tmp_path)
    assert not claim_output_folder(tmp_path, RECORD, overwrite=True)
    assert json.loads((tmp_path / RUN_FILE).read_text()) == RECORD
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "notes.txt", RUN_FILE, UNFINISHED}
    assert not (tmp_path / kept).exists()


def test_all_that_a_run_writes_there_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is told from what is not a run's by its name, and goes when the run is finished; what came beside it stays."""
    output, seen = tmp_path / "run", set[str]()
    command = ["train", str(make_folder(tmp_path / "images")), "--model", "test_resnet", "--output", str(output)]
    command.append("--baselines")
    times = BackwardTimes(unfrozen=100.0, frozen=1.0, classifier_alone=0.5, batch_size=8)

    def look(*arguments: object, **keywords: object) -> float:
        assert find_others(output) == []
        seen.update(tree(output / UNFINISHED))
        put(output, THESIS, f"{UNFINISHED}/checkpoints/best.safetensors")
        return 0.5

    monkeypatch.setattr(run_module, "random_backbone_accuracy", look)
    monkeypatch.setattr(run_module, "measure_backward", lambda *arguments: times)
    (tmp_path / "phases.toml").write_text("[[phases]]\nepochs = 1\n[[phases]]\nepochs = 1\ntrainable_groups = 1")
    assert cli.main([*command, "--phases", str(tmp_path / "phases.toml")]) == 0
    assert {"lock", "checkpoints", "features-train/slot-0.bin", "features-test/manifest.json"} <= seen
    said = "left as they are: unfinished/chapter1/, unfinished/chapter1/thesis.txt, unfinished/checkpoints/best."
    assert said in capsys.readouterr().err
    left = {"lock", "chapter1", "chapter1/thesis.txt", "checkpoints", "checkpoints/best.safetensors"}
    assert set(tree(output / UNFINISHED)) == left


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("features-train-0-of-2/slot-11.bin", True),
        (".features-test-1-of-2.new.some-host.example.123/manifest.json", True),
        (".features-train.old.host.123/slot-0.bin", True),
        ("checkpoints/.step-000000010.safetensors.123", True),
        ("checkpoints/step-000000010.safetensors/mine.txt", False),
        ("checkpoints/.step-mine", False),
        ("checkpoints/.tmprzsFOP", True),
        ("checkpoints/.tmp-mine", False),
        ("features-mine/slot-0.bin", False),
        (".features-train.backup/slot-0.bin", False),
        ("checkpoints.txt", False),
    ],
)
def test_names_are_known_to_the_letter(tmp_path: Path, name: str, known: bool) -> None:
    put(tmp_path, f"{UNFINISHED}/{name}")
    assert (find_others(tmp_path) == []) == known
    clear(tmp_path / UNFINISHED)
    assert (tmp_path / UNFINISHED / name).exists() != known


@pytest.mark.parametrize("name", [".DS_Store", "checkpoints/.DS_Store", "Thumbs.db", ".nfs000000000012ab34"])
def test_what_a_file_manager_or_a_file_system_leaves_is_in_nobodys_way(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{UNFINISHED}/{name}")
    assert find_others(tmp_path) == []
    clear(tmp_path / UNFINISHED)
    assert (tmp_path / UNFINISHED / name).exists()


def test_a_link_that_leads_nowhere_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError, match=r"link is a link that leads nowhere; pass a folder with --output"):
        check_output_folder(tmp_path / "link", overwrite=True)
