"""`tuning.py`: the ways to train match their names, and a small run writes a page and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tuning
from learning_runs.arms import Outcome

from backbone_finetune import FineTuneModel

pytestmark = [pytest.mark.benchmarks, pytest.mark.usefixtures("one_thread")]


def test_the_ways_match_their_names() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=10)
    ways = tuning.ways(500, model)
    assert list(ways) == tuning.ARMS
    assert [phase.trainable_groups for phase in ways["frozen head"]] == [0]
    assert [phase.trainable_groups for phase in ways["tune"]] == [0, 2, 5]
    augmented = [name for name, phases in ways.items() if phases[-1].augment is not None]
    assert augmented == ["tune", tuning.LIGHT, "two phases"]
    for name in tuning.PLAIN:
        (phase,) = ways[name]
        assert phase.trainable_groups == 5
        assert name == f"plain, {phase.backbone_lr:g}"


def test_gains_are_of_the_same_splits() -> None:
    drawn = [("tune", 0, 0.7), ("tune", 1, 0.5), ("frozen head", 0, 0.6), ("frozen head", 1, 0.5), ("tune", 2, 0.1)]
    outcomes = [Outcome(arm, "clipart", seed, {"plain": accuracy}, 1.0) for arm, seed, accuracy in drawn]
    (line,) = tuning.gain_table(outcomes).splitlines()[2:]
    assert [cell.strip() for cell in line.strip("| ").split("|")] == ["tune / frozen head", "+0.050 ± 0.071", "1 of 2"]


def test_a_small_run_writes_a_page_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--splits", "1", "--image-size", "32", "--sets", "clipart", "--output", str(tmp_path / "tuning")]
    command += ["--arms", "frozen head"]
    assert tuning.main(command) == 0
    assert "clipart 0: frozen head" in capsys.readouterr().out
    page = (tmp_path / "tuning.md").read_text()
    assert "| frozen head |" in page
    (outcome,) = json.loads((tmp_path / "tuning.json").read_text())["outcomes"]
    assert 0 <= outcome["accuracy"]["plain"] <= 1
    assert tuning.main(command) == 0
    assert capsys.readouterr().out == ""
    assert tuning.main([*command, "--splits", "2"]) == 2
    assert "tuning.json has results of other settings" in capsys.readouterr().err
