"""TensorBoard, MLflow and Weights & Biases: a resumed run has each epoch once, and everything is in its folder."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from image_folders import make_folder

from backbone_finetune.cli import main

Figures = dict[str, list[tuple[int, float]]]  # steps and values by name

pytestmark = [
    pytest.mark.clients,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),  # mlflow's own tables
]


def read_tensorboard(output: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    (run,) = (output / "tensorboard").iterdir()
    (settings,) = run.rglob("hparams.yml")
    assert "phases/1/epochs: 3" in settings.read_text()
    events = EventAccumulator(str(run)).Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def read_mlflow(output: Path) -> Figures:
    import mlflow  # noqa: PLC0415

    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'backbone-finetune'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params["phases/1/epochs"]) == ("FINISHED", "3")
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {name: [(each.step, each.value) for each in history] for name, history in histories.items()}


def read_wandb(output: Path) -> Figures:
    """Read what `wandb sync` would send; the resumed part is a second folder of the same run."""
    from wandb.proto.wandb_internal_pb2 import Record  # noqa: PLC0415

    figures: Figures = defaultdict(list)
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    for file in files:
        content, position, record = file.read_bytes(), 7, b""
        while position < len(content):  # LevelDB's log: blocks of 32 KiB, in them pieces with a header of 7 bytes
            if (left := 2**15 - position % 2**15) < 7:
                position += left
                continue
            end = position + 7 + int.from_bytes(content[position + 4 : position + 6], "little")
            record += content[position + 7 : end]
            if content[position + 6] in (1, 4):  # whole, or the last piece
                items = Record.FromString(record).history.item
                values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                for name, value in values.items():
                    figures[name].append((values["_step"], value))
                record = b""
            position = end
    return figures


@pytest.mark.parametrize("kind", ["tensorboard", "mlflow", "wandb"])
def test_a_resumed_run_has_each_epoch_once_and_the_test_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    pytest.importorskip(kind)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    options = ["--model", "test_resnet", "--epochs", "3", "--lr", "0.05", "--device", "cpu", "--monitor", "loss"]
    command = ["train", str(make_folder(tmp_path / "images")), *options, "--log-with", kind, "--output", "run"]
    tracker = LOGGER_TYPE_TO_CLASS[kind]
    log = tracker.log

    def stop(self: GeneralTracker, values: dict[str, Any], step: int | None = None) -> None:
        log(self, values, step)
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracker, "log", stop)
        assert main(command) == 130
    assert main(command) == 0
    assert sorted(os.listdir()) == ["images", "run"]
    figures = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}[kind](tmp_path / "run")
    metrics = json.loads(Path("run", "metrics.json").read_text())
    assert [step for step, _ in figures["validation/loss"]] == [1, 2, 3]
    losses = [result["validation_loss"] for result in metrics["history"]]
    assert [value for _, value in figures["validation/loss"]] == pytest.approx(losses)
    assert figures["test/accuracy"] == [(3, pytest.approx(metrics["test_accuracy"]))]


def test_mlflow_writes_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/all.db")
    options = ["--model", "test_resnet", "--epochs", "1", "--device", "cpu", "--log-with", "mlflow"]
    assert main(["train", str(make_folder(tmp_path / "images")), *options, "--output", str(tmp_path / "run")]) == 0
    assert (tmp_path / "all.db").is_file()
    assert not (tmp_path / "run" / "mlflow.db").exists()
