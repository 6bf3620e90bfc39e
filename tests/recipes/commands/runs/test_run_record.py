"""run.json: it repeats a run with the same weights; other files give a one-line error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_folders import COLOURS, make_folder, make_image
from safetensors.torch import load_file

from backbone_finetune import cli

Fail = Callable[..., str]
PHASES = "[[phases]]\nepochs = 1\n[[phases]]\nepochs = 1\ntrainable_groups = 1"


@pytest.fixture
def fail(capfd: pytest.CaptureFixture[str]) -> Fail:
    """Run a command that must fail with status 2 and one line on stderr, which is returned."""

    def run(*arguments: object) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        return line.removeprefix("backbone-finetune: error: ")

    return run


def test_a_record_repeats_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "here" / "images")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), "weights.pth")
    (tmp_path / "here" / "phases.toml").write_text(PHASES)
    options = "--model test_resnet --input-size 32 --checkpoint weights.pth --phases phases.toml --seed 3"
    options += " --batch-size 4 --output first"
    assert cli.main(["train", "images", *options.split()]) == 0
    monkeypatch.chdir(tmp_path / "there")
    first, second = tmp_path / "here" / "first", tmp_path / "there" / "second"
    capfd.readouterr()
    assert cli.main(["train", "--run", str(first / "run.json"), "--output", "second"]) == 0
    assert "this run differs" not in capfd.readouterr().err
    weights, again = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())
    record = json.loads((first / "run.json").read_text())
    assert json.loads((second / "run.json").read_text()) == record
    assert record["arguments"]["mixed_precision"] == "no"
    assert record["arguments"]["checkpoint"] == str(tmp_path / "here" / "weights.pth")

    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        record["arguments"]["autocast_features"] = True
        (tmp_path / "elsewhere.json").write_text(json.dumps(record))
        assert cli.main(["train", "--run", str(tmp_path / "elsewhere.json"), "--output", "plain"]) == 0
        assert "this run differs from the recorded one: autocast_features: true there, false here" in (
            capfd.readouterr().err
        )

    make_image(tmp_path / "here" / "images" / "red" / "more.png", COLOURS["red"])
    assert cli.main(["train", "--run", str(first / "run.json"), "--output", "third"]) == 0
    assert "this run differs from the recorded one: train_images count: 12 there, 13 here" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("others", "option"),
    [
        ("images", "DATA"),
        ("--model resnet18", "--model"),
        ("--seed 0", "--seed"),
        ("--epochs 3", "--epochs"),
        ("--phases p.toml", "--phases"),
        ("--pretrained", "--pretrained"),
        ("--no-norm-eval", "--no-norm-eval"),
        ("--trainable-only", "--trainable-only"),
    ],
)
def test_a_record_with_other_options_is_one_line(fail: Fail, others: str, option: str) -> None:
    line = fail("train", "--run", "run.json", *others.split(), "--output", "again", "--overwrite", "--device", "cpu")
    assert line == (
        f"{option} and --run run.json were both given; the file has all options except --baselines, --cache, "
        "--check-labels, --device, --log-with, --output, --overwrite and --workers"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "run.json: not JSON ("),
        ("[" * 100_000, "run.json: not JSON ("),
        ("[]", "run.json: input should be a valid dictionary"),
        ("{}", "run.json: arguments: field required; pass"),
        (
            {"overwrite": True},
            "baselines, cache, check_labels, log_with, output, overwrite, workers are not part of a record; pass the",
        ),
        ({"more": 1}, "run.json: arguments more = 1: unexpected keyword argument; pass"),
        ({"pretrained": 3}, "run.json: arguments pretrained = 3: input should be a valid boolean"),
        (
            {"phases": [{"epochs": 0}]},
            "run.json: arguments phases 1 epochs = 0: input should be greater than or equal to 1",
        ),
        ({"phases": []}, "run.json: arguments phases = []: tuple should have at least 1 item"),
        ({"checkpoint": 3}, "run.json: arguments checkpoint = 3: input is not a valid path"),
        ({"batch_size": 0}, "run.json: arguments batch_size = 0: input should be greater than or equal to 1"),
    ],
)
def test_an_invalid_record_is_one_line(tmp_path: Path, fail: Fail, content: Any, message: str) -> None:
    arguments = {
        "images": None,
        "architecture": None,
        "pretrained": False,
        "checkpoint": None,
        "phases": [{}],
        "batch_size": 1,
        "accumulation": 1,
        "seed": 0,
        "checkpoint_steps": 1,
        "mixed_precision": "no",
        "autocast_features": False,
        "device": "cpu",
        "trainable_only": False,
    }
    text = content if isinstance(content, str) else json.dumps({"arguments": {**arguments, **content}})
    (tmp_path / "run.json").write_text(text)
    assert message in fail("train", "--run", tmp_path / "run.json", "--output", tmp_path / "run")
