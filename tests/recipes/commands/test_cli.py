"""The command line: one line for each error, and the default run on the packaged images."""

from __future__ import annotations

import csv
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
from image_folders import COLOURS, make_folder, make_image
from raising_hooks import raising
from torch import nn

from backbone_finetune import cli
from backbone_finetune.recipes.commands.settings import CLIPART
from backbone_finetune.recipes.training.epoch import DivergedError

Fail = Callable[..., str]


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a command that must fail with exit status 2 and one line on stderr, which is returned.

    On stdout there may be lines about the images that were found.
    """

    def run(*arguments: object) -> str:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code  # type: ignore[assignment]
        printed = capsys.readouterr()
        assert status == 2
        of_the_data = ("train: ", "validation: ", "test: ", "images by class, ")
        assert all(line.startswith(of_the_data) for line in printed.out.splitlines())
        (line,) = printed.err.splitlines()
        assert line.startswith("backbone-finetune: error: ")
        return line.removeprefix("backbone-finetune: error: ")

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model with the command line; no test may change its folder."""
    folder = tmp_path_factory.mktemp("trained")
    images = str(make_folder(folder / "images"))
    output = folder / "run"
    arguments = ["train", images, "--model", "test_resnet", "--epochs", "2", "--lr", "0.01", "--output", str(output)]
    assert cli.main(arguments) == 0
    return output / "model.safetensors"


def test_train_accepts_a_folder_and_every_option(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = make_folder(tmp_path / "images")
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "weights.pth")
    output = tmp_path / "run"
    options = (
        f"--model test_resnet --checkpoint {tmp_path / 'weights.pth'} --epochs 1 --seed 7 --trainable-groups 1 "
        f"--lr 0.01 --backbone-lr 0.002 --weight-decay 0.1 --batch-size 4 --device cpu --output {output} "
        "--accumulation 2 --checkpoint-steps 3 --layer-decay 0.75 --warmup-epochs 0.5 --cosine"
    )
    assert cli.main(["train", str(images), *options.split()]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["phases"] == [
        {
            "epochs": 1,
            "trainable_groups": 1,
            "lr": 0.01,
            "backbone_lr": 0.002,
            "layer_decay": 0.75,
            "weight_decay": 0.1,
            "warmup_epochs": 0.5,
            "cosine": True,
            "norm_eval": True,
            "standardize": False,
            "augment": None,
            "mixup": 0.0,
            "cutmix": 0.0,
        }
    ]
    assert (metrics["seed"], metrics["batch_size"]) == (7, 4)
    assert (metrics["architecture"], metrics["device"]) == ("test_resnet", "cpu")
    run = json.loads((output / "run.json").read_text())
    assert run["arguments"]["phases"] == metrics["phases"]
    assert (run["arguments"]["accumulation"], run["arguments"]["checkpoint_steps"]) == (2, 3)
    assert metrics["weights"] == f"weights from {tmp_path / 'weights.pth'}"
    printed = capfd.readouterr()
    assert "layer4         267,840  trainable  train" in printed.out
    assert "epoch 1/1: 100%" in printed.err


def test_predict_prints_a_line_for_each_image(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [trained.parents[1] / "images" / name / "0.png" for name in COLOURS]
    assert cli.main(["predict", str(trained), *map(str, images), "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, path in zip(lines, images, strict=True):
        classes = line.removeprefix(f"{path}: ").split(", ")
        assert len(classes) == 2
        assert {text.split()[0] for text in classes} <= set(COLOURS)
        shares = [float(text.split()[1].rstrip("%")) for text in classes]
        assert shares == sorted(shares, reverse=True)


def test_predict_reports_unreadable_images_and_continues(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("a text file")
    whole = make_image(tmp_path / "red.png", COLOURS["red"])
    arguments = ["predict", str(trained), str(tmp_path / "text.jpg"), str(tmp_path / "missing.png"), str(whole)]
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert [line.partition(":")[0] for line in printed.out.splitlines()] == [str(whole)]
    first, second, third = printed.err.splitlines()
    assert first.startswith(f"backbone-finetune: skipped: {tmp_path / 'text.jpg'}: not a readable image (")
    assert second == f"backbone-finetune: skipped: {tmp_path / 'missing.png'}: there is no such file"
    assert third == "backbone-finetune: error: 2 of 3 images could not be read"


def test_predict_searches_folders_and_writes_csv_and_json_lines(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(3):
        make_image(tmp_path / "in" / "deep" / f"{index}.png", COLOURS["red"], seed=index)
    (tmp_path / "in" / "broken.jpg").write_bytes(b"")
    arguments = ["predict", str(trained), str(tmp_path / "in"), "--top-k", "9", "--batch-size", "2", "--output"]
    for file in (tmp_path / "a.csv", tmp_path / "a.jsonl"):
        assert cli.main([*arguments, str(file)]) == 2
        printed = capsys.readouterr()
        assert printed.out == f"wrote {file}: 3 images\n"
        assert "skipped: " in printed.err
    paths = [tmp_path / "in" / "broken.jpg", *(tmp_path / "in" / "deep" / f"{index}.png" for index in range(3))]
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    entries = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [entry["image"] for entry in entries] == [str(path) for path in paths]
    assert rows[0]["error"] == entries[0]["error"] != ""
    assert (rows[0]["class_1"], entries[0]["classes"]) == ("", [])
    assert rows[1]["class_1"] == entries[1]["classes"][0]["name"]
    assert float(rows[1]["probability_3"]) == entries[1]["classes"][2]["probability"]
    assert sum(found["probability"] for found in entries[1]["classes"]) == pytest.approx(1)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "a.csv", "a.jsonl"}
    alone = [*arguments[:2], str(tmp_path / "in" / "deep" / "0.png"), "--output", str(tmp_path / "one.csv")]
    assert cli.main(alone) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'one.csv'}: 1 image\n"


def test_evaluate_prints_a_table_and_writes_four_files(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_folder(tmp_path / "images", per_class=2)
    (images / "red" / "broken.png").write_bytes(b"")
    output = tmp_path / "out"
    assert cli.main(["evaluate", str(trained), str(images), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [[name, "2"] for name in COLOURS]
    assert lines[4].startswith("accuracy ")
    names = ("evaluation.json", "predictions.csv", "confusion.png", "report.html")
    assert lines[-1] == f"wrote {', '.join(str(output / name) for name in names)}"
    skipped = [line for line in printed.err.splitlines() if "skipped: " in line]
    assert len(skipped) == 1
    assert f"backbone-finetune: skipped: {images / 'red' / 'broken.png'}: not a readable image" in skipped[0]


def test_trainable_only_writes_a_small_file_that_needs_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Fail
) -> None:
    images = make_folder(tmp_path / "images")
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), weights)
    model = tmp_path / "run" / "model.safetensors"
    train = ["train", str(images), "--model", "test_resnet", "--epochs", "1", "--trainable-only"]
    assert "the backbone starts from random weights" in fail(*train, "--output", model.parent)
    assert cli.main([*train, "--checkpoint", str(weights), "--output", str(model.parent)]) == 0
    assert model.stat().st_size < 10_000
    capsys.readouterr()
    image = images / "red" / "0.png"
    message = f"on top of test_resnet with weights from {weights}; give the weights file that it was trained on (--base"
    assert message in fail("predict", model, image)
    assert cli.main(["predict", str(model), str(image), "--base", str(weights)]) == 0

    capsys.readouterr()
    further = ["train", str(images), "--epochs", "1", "--checkpoint", str(model), "--output", str(tmp_path / "further")]
    assert message in fail(*further)
    assert cli.main([*further, "--base", str(weights)]) == 0
    capsys.readouterr()
    assert "is for a --checkpoint that `train --trainable-only` wrote" in fail(
        "train", images, "--model", "test_resnet", "--base", weights, "--output", tmp_path / "random"
    )


def test_what_training_changed_is_no_base_of_other_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fail: Fail
) -> None:
    """Nothing could load the second file, as --base takes whole weights."""
    weights, first, second = tmp_path / "weights.pth", tmp_path / "first", tmp_path / "second"
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    train = ["train", str(make_folder(tmp_path / "images")), "--epochs", "1", "--trainable-only", "--output"]
    assert cli.main([*train, str(first), "--model", "test_resnet", "--checkpoint", str(weights)]) == 0
    capsys.readouterr()
    message = (
        "has only what training changed, so it cannot be the base of another such file; leave out --trainable-only"
    )
    assert message in fail(*train, second, "--checkpoint", first / "model.safetensors")
    assert not second.exists()


def test_inspect_prints_the_frozen_groups_of_a_trained_model(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{trained}: 3 classes (blue, green, red)"
    assert f"timm {timm.__version__}" in lines[1]
    assert [line.split()[-1] for line in lines[5:]] == ["frozen"] * 5 + ["trainable"]
    shares = [float(line.split()[-2].rstrip("%")) for line in lines[5:]]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares[0] > shares[1] > shares[3]


def test_inspect_prints_groups_and_parameters_without_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "resnet50.a1_in1k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resnet50.a1_in1k: 23,508,032 parameters in 5 layer groups")
    assert [line.split()[:2] for line in lines[3:8]] == [
        ["stem", "9,536"],
        ["layer1", "215,808"],
        ["layer2", "1,219,584"],
        ["layer3", "7,098,368"],
        ["layer4", "14,964,736"],
    ]
    assert [line.split()[-1] for line in lines[3:8]] == ["5", "4", "3", "2", "1"]
    assert lines[8].startswith("classifier")


def test_inspect_accepts_networks_without_a_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "qwen3_vit_88m_enc"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("no classifier: `train` cannot use it")


def test_inspect_prints_what_can_be_cached(capsys: pytest.CaptureFixture[str], fail: Fail) -> None:
    assert cli.main(["inspect", "test_resnet", "--trainable-groups", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "",
        "--trainable-groups 2: computed once for each image, and cached:",
        "  backbone.layer2: 48 x 20 x 20 float32, 76.8 kB per image",
        "each epoch then computes 11.2% of the forward and 10.5% of the backward operations of training all",
    ]
    assert cli.main(["inspect", "test_resnet", "--trainable-groups", "5"]) == 0
    assert capsys.readouterr().out.endswith("--trainable-groups 5: nothing can be cached: every parameter trains\n")
    assert "trainable_groups=6: the backbone has 5 layer groups" in fail(
        "inspect", "test_resnet", "--trainable-groups", 6
    )


def test_trainable_groups_and_a_model_file_raise(trained: Path, fail: Fail) -> None:
    assert fail("inspect", trained, "--trainable-groups", 1) == (
        f"--trainable-groups and the model file {trained} were both given; pass an architecture"
    )


@pytest.mark.parametrize("command", ["inspect {}", "train IMAGES --model {}", "train IMAGES --pretrained --model {}"])
def test_an_unknown_architecture_is_one_line_with_the_nearest(tmp_path: Path, fail: Fail, command: str) -> None:
    images = make_folder(tmp_path / "images")
    line = fail(*command.format("resnet51").replace("IMAGES", str(images)).split())
    assert line.startswith(f"resnet51: timm {timm.__version__} has no such architecture; the nearest names are ")
    assert "resnet50" in line


def test_each_error_is_one_line(tmp_path: Path, fail: Fail) -> None:
    images, output = make_folder(tmp_path / "images"), tmp_path / "run"
    (tmp_path / "empty").mkdir()
    make_image(tmp_path / "single" / "cat" / "1.png", (0, 0, 0))
    (tmp_path / "text.pth").write_text("a text file")
    small = ("--model", "test_resnet", "--output", output)
    assert "nowhere: there is no such file or folder" in fail("train", tmp_path / "nowhere", *small)
    assert "empty has no sub-folders" in fail("train", tmp_path / "empty", *small)
    assert "single has one class only (cat)" in fail("train", tmp_path / "single", *small)
    assert "trainable_groups=6: the backbone has 5 layer" in fail("train", images, *small, "--trainable-groups", 6)
    assert "device 'tpu': not on this machine" in fail("train", images, *small, "--device", "tpu")
    assert "text.pth: not a readable weights file" in fail(
        "train", images, *small, "--checkpoint", tmp_path / "text.pth"
    )
    # Before any image is read.
    assert "nowhere.pth: there is no such file" in fail("train", "no data", *small, "--checkpoint", "nowhere.pth")
    said = fail("predict", tmp_path / "text.pth", "tom.jpg")
    assert "text.pth: not a safetensors file, or a truncated one, so no model of backbone-finetune; pass the" in said
    for exported in ("m.xml", "m.pt2"):
        message = f"{exported}: give a .safetensors or .onnx file, local-dir:FOLDER or hf-hub:OWNER/NAME"
        assert fail("predict", exported, images) == message
    assert "nowhere.safetensors: no such file" in fail("predict", tmp_path / "nowhere.safetensors", "tom.jpg")
    assert "nowhere.safetensors: no such file" in fail("inspect", tmp_path / "nowhere.safetensors")
    assert "text.pth: not a safetensors file" in fail("inspect", tmp_path / "text.pth")
    assert "empty: no image in it" in fail("predict", tmp_path / "nowhere.safetensors", tmp_path / "empty")
    assert not output.exists()


def test_a_finished_model_is_not_replaced(trained: Path, fail: Fail) -> None:
    before = trained.read_bytes()
    images = trained.parents[1] / "images"
    line = fail("train", images, "--model", "test_resnet", "--output", trained.parent)
    assert line == (
        f"{trained.parent} already holds run.json, model.safetensors, metrics.json, curves.png, report.html, "
        "predictions.csv; pass --overwrite to replace them, or another folder with --output"
    )
    assert trained.read_bytes() == before


def test_a_truncated_model_is_one_line(trained: Path, tmp_path: Path, fail: Fail) -> None:
    truncated = tmp_path / "model.safetensors"
    truncated.write_bytes(trained.read_bytes()[:-1])
    assert "model.safetensors: not a safetensors file, or a truncated one" in fail("predict", truncated, "tom.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND (see backbone-finetune --help)"),
        ("tarin", "invalid choice: 'tarin'"),
        (
            "train --epochs 0",
            "epochs = 0: input should be greater than or equal to 1",
        ),
        ("train --epochs many", "argument --epochs: invalid int value: 'many' (see backbone-finetune train --help)"),
        ("train --seed -1", "seed = -1: input should be greater than or equal to 0"),
        ("train --batch-size 0", "batch_size = 0: input should be greater than or equal to 1"),
        ("train --trainable-groups -1", "trainable_groups = -1: input should be greater than or equal to 0"),
        ("train --lr 0", "lr = 0.0: input should be greater than 0"),
        ("train --lr nan", "lr = nan: input should be a finite number"),
        ("train --backbone-lr inf", "backbone_lr = inf: input should be a finite number"),
        ("train --layer-decay 1.5", "layer_decay = 1.5: input should be less than or equal to 1"),
        ("train --warmup-epochs -1", "warmup_epochs = -1.0: input should be greater than or equal to 0"),
        ("train --epochs 1 --warmup-epochs 2", "warmup_epochs = 2.0: expected a number from 0 to its 1 epochs"),
        ("train --cosine --phases p.toml", "--cosine and --phases p.toml were both given; write it into the file's"),
        ("train --weight-decay -1", "weight_decay = -1.0: input should be greater than or equal to 0"),
        ("train --modle resnet18", "unrecognized arguments: --modle"),
        ("predict model.safetensors", "the following arguments are required: IMAGE"),
        ("evaluate model.safetensors", "the following arguments are required: DATA"),
        ("inspect", "the following arguments are required: NAME|MODEL"),
    ],
)
def test_a_wrong_argument_is_one_line(fail: Fail, arguments: str, message: str) -> None:
    assert message in fail(*arguments.split())


@pytest.mark.parametrize("option", ["--top-k", "--batch-size"])
def test_predict_needs_positive_numbers(trained: Path, fail: Fail, option: str) -> None:
    image = trained.parents[1] / "images" / "red" / "0.png"
    name = option.removeprefix("--").replace("-", "_")
    assert fail("predict", trained, image, option, 0) == f"{name} = 0: input should be greater than or equal to 1"


def test_an_interrupt_is_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = trained.parents[1] / "images"
    with raising(KeyboardInterrupt(), lambda module: isinstance(module, nn.Conv2d) and not module.weight.is_meta):
        assert cli.main(["predict", str(trained), str(images)]) == 130
    assert capsys.readouterr().err == "backbone-finetune: interrupted\n"


def test_an_interrupt_before_any_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(list[str]):
        def __iter__(self) -> Iterator[str]:
            raise KeyboardInterrupt

    assert cli.main(Interrupted(["train"])) == 130
    assert capsys.readouterr().err == "backbone-finetune: interrupted\n"


def test_an_error_contains_no_control_characters(fail: Fail) -> None:
    assert fail("predict", "a\x1b[2Jcat", "tom.jpg").startswith("a\N{REPLACEMENT CHARACTER}[2Jcat: no such file")


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({"RANK": "1"}, ""),
        ({"RANK": "1", "WORLD_SIZE": "1"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ""),
        ({"RANK": "1", "WORLD_SIZE": "2"}, " in process 1"),
        ({"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, " in process 8"),
    ],
)
def test_of_an_error_that_several_processes_meet_the_first_prints_a_line(
    environment: dict[str, str], process: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["predict", "no such model", "tom.jpg"]) == 2  # perhaps on this process alone
    assert capsys.readouterr().err.startswith(f"backbone-finetune: error{process}: no such model: no such file")
    shared = ValueError("met by all")
    monkeypatch.setattr(shared, "is_on_all_processes", True, raising=False)
    for error in (shared, DivergedError("together")):
        monkeypatch.setattr(cli, "train", Mock(side_effect=error))
        for given in (["--epochs", "0"], []):
            assert cli.main(["train", *given]) == 2
            assert (": error" in capsys.readouterr().err) == (not process)


def test_an_error_before_processes_know_each_other_is_printed_once_on_each_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["predict", "no such model", "tom.jpg"]) == 2
    assert capsys.readouterr().err == ""


def test_predictions_in_another_format_are_refused(trained: Path, fail: Fail) -> None:
    image = trained.parents[1] / "images" / "red" / "0.png"
    line = fail("predict", trained, image, "--output", "answers.json")
    assert line == "answers.json: predictions are written to a file that ends in .csv, .jsonl or .parquet"


def test_outputs_are_checked_before_the_images(
    trained: Path, tmp_path: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"  # whose only image is broken, which would be another line on stderr
    (images / "red").mkdir(parents=True)
    (images / "red" / "0.png").write_bytes(b"no image")
    (tmp_path / "folder.csv").mkdir()
    line = fail("predict", trained, images, "--output", tmp_path / "folder.csv")
    assert line == f"{tmp_path}/folder.csv is a folder; pass the path of a file with --output"
    line = fail("predict", trained, images, "--output", tmp_path / "none" / "answers.csv")
    assert line.startswith(f"{tmp_path}/none/answers.csv: there is no folder {tmp_path}/none; create it")
    (tmp_path / "file").touch()
    line = fail("evaluate", trained, images, "--output", tmp_path / "file" / "below")
    assert line == f"{tmp_path}/file is a file; pass a folder with --output"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    for command, output in (("predict", "answers.csv"), ("evaluate", "evaluation")):
        line = fail(command, trained, images, "--output", tmp_path / output)
        assert line == f"{tmp_path} is not writable; pass another folder with --output"


def test_an_error_of_many_lines_is_one_line(fail: Fail) -> None:
    assert fail("predict", "no\n\tsuch\n\nmodel", "tom.jpg").startswith("no such model: no such file")


def test_an_internal_error_is_not_hidden(trained: Path) -> None:
    images = trained.parents[1] / "images"
    with (
        raising(RuntimeError("a fault"), lambda module: isinstance(module, nn.Conv2d) and not module.weight.is_meta),
        pytest.raises(RuntimeError, match="a fault"),
    ):
        cli.main(["predict", str(trained), str(images)])


def test_train_without_arguments_and_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    connect, hosts = socket.socket.connect, []

    def refuse(given: object, *address: Any) -> None:
        if isinstance(given, socket.socket) and given.family == socket.AF_UNIX:  # of processes that load images
            connect(given, *address)
        else:
            hosts.append((given, address))
            raise OSError("offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert cli.main(["train"]) == 0
    assert hosts == []
    printed = capfd.readouterr()
    folder = tmp_path / "fine-tuned"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test_accuracy"] > 0.60
    assert metrics["test_accuracy"] > metrics["random_backbone"] + 0.2
    assert metrics["test_accuracy"] > metrics["raw_pixels"]
    assert metrics["chance"] < 0.25
    assert (metrics["architecture"], len(metrics["class_names"])) == ("tf_efficientnet_lite0", 10)
    assert metrics["skipped_images"] == []
    assert "fine-tuned/model.safetensors" in printed.out

    images = sorted((CLIPART / "bird").iterdir())[:20]
    assert cli.main(["predict", "fine-tuned/model.safetensors", *map(str, images)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sum(": bird " in line for line in lines) >= 12


def test_image_names_are_printed_without_control_characters(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_image(tmp_path / "good\x1b[2J.png", COLOURS["red"])
    (tmp_path / "broken\x1b[2J.png").write_bytes(b"no image")
    assert cli.main(["predict", str(trained), str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "good\N{REPLACEMENT CHARACTER}[2J.png" in printed.out
    assert "broken\N{REPLACEMENT CHARACTER}[2J.png" in printed.err
