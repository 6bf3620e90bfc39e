"""The command `export`."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from exported_models import make_trained
from image_folders import make_folder
from raising_hooks import raising, trains
from steps import StoppedError

from backbone_finetune import cli
from backbone_finetune.recipes import save_trained_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_trained_model(make_trained(), tmp_path / "model.safetensors", record={})
    return tmp_path / "model.safetensors"


def test_it_says_what_it_wrote_and_how_far_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path / "images", per_class=1)
    arguments = ["export", str(model), "--to", "timm", "plain.safetensors", "--images", str(tmp_path / "images")]
    assert cli.main(arguments) == 0
    wrote, compared, use = capsys.readouterr().out.splitlines()
    assert wrote == "wrote plain.safetensors"
    assert compared.startswith("largest difference from the PyTorch logits: 0 (largest logit ")
    assert compared.endswith("), on 3 of your images")
    assert use == "load it with timm.create_model('test_resnet', num_classes=3, checkpoint_path='plain.safetensors')"
    timm.create_model("test_resnet", num_classes=3, checkpoint_path="plain.safetensors")


def test_the_model_itself_is_never_replaced(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert cli.main(["export", str(model), "--to", "timm", str(model)]) == 2
    assert "model.safetensors exists already" in capsys.readouterr().err
    assert model.read_bytes() == before


def test_train_says_before_it_starts_that_a_family_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_folder(tmp_path / "images", per_class=2)
    arguments = ["train", str(images), "--epochs", "1", "--cache", "off", "--output"]
    with raising(StoppedError(), when=trains), pytest.raises(StoppedError):
        cli.main([*arguments, str(tmp_path / "levit"), "--model", "levit_128s"])
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("export:")]
    assert said.startswith("export:   levit_128s: timm's own network")
    assert said.endswith("export --to onnx, torch-export or openvino instead")
    assert cli.main([*arguments, str(tmp_path / "resnet"), "--model", "test_resnet"]) == 0
    assert "export:" not in capsys.readouterr().out


def test_preprocessing_is_for_onnx_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(model), "--to", "timm", "plain.safetensors", "--preprocessing"]) == 2
    assert "--preprocessing was given, and --to is timm; it is for onnx alone" in capsys.readouterr().err
