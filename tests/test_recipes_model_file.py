"""The model file: what was trained comes back; what is not such a file is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from picture_folders import COLOURS, make_picture
from safetensors.torch import load_file, save_file

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import read_checkpoint, save_checkpoint
from backbone_finetune.recipes.model_file import (
    TrainedModel,
    build_transform,
    load_trained_model,
    save_trained_model,
)
from backbone_finetune.recipes.pictures import read_picture
from backbone_finetune.recipes.prediction import predict


def make_trained() -> TrainedModel:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    data_config = timm.data.resolve_model_data_config(model, args={"input_size": (3, 64, 48), "mean": (0.1, 0.2, 0.3)})
    return TrainedModel(model, "test_resnet", tuple(COLOURS), data_config)


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    trained = make_trained()
    with torch.no_grad():  # statistics count as well as weights
        trained.model(torch.randn(4, 3, 64, 48))
    save_trained_model(trained, tmp_path / "model.safetensors", record={"seed": 3})
    loaded = load_trained_model(tmp_path / "model.safetensors")
    assert (loaded.architecture, loaded.class_names) == ("test_resnet", tuple(COLOURS))
    assert loaded.data_config == dict(trained.data_config)
    assert not loaded.model.training
    pictures = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(loaded.model(pictures), trained.model.eval()(pictures))
    assert json.loads(read_checkpoint(tmp_path / "model.safetensors")[1]["record"]) == {"seed": 3}


def test_predictions_are_the_likeliest_classes_in_order(tmp_path: Path) -> None:
    trained = make_trained()
    path = make_picture(tmp_path / "red.png", COLOURS["red"])
    missing = tmp_path / "missing.png"
    first, second = predict(trained, [missing, path], top_k=2)
    assert (first.path, first.classes) == (missing, ())
    assert first.error == f"{missing}: there is no such file"
    with torch.no_grad():
        logits = trained.model.eval()(build_transform(trained.data_config)(read_picture(path))[None])[0]
    order = logits.argsort(descending=True).tolist()
    assert [name for name, _ in second.classes] == [trained.class_names[index] for index in order[:2]]
    expected = logits.softmax(0)[order[:2]].tolist()
    assert [share for _, share in second.classes] == pytest.approx(expected)
    assert len(next(predict(trained, [path], top_k=99)).classes) == 3


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save_trained_model(make_trained(), tmp_path / "model.safetensors", record={})
    return tmp_path / "model.safetensors"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        load_trained_model(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_trained_model(written)


def test_a_foreign_file_is_refused(written: Path) -> None:
    written.write_text("a text file that is not a model")
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file"):
        load_trained_model(written)


def test_a_safetensors_file_of_other_origin_is_refused(written: Path) -> None:
    save_file(load_file(written), written, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*not one of backbone-finetune"):
        load_trained_model(written)


@pytest.mark.parametrize(
    ("entry", "text", "message"),
    [
        ("architecture", None, r"not a model that `backbone-finetune train` wrote.*architecture"),
        ("architecture", "hf-hub:someone/something", r"has no architecture 'hf-hub:someone/something'"),
        ("class_names", None, r"not a model that .*class_names"),
        ("class_names", '"cat"', r"class_names: \"cat\"; expected a list of two names or more"),
        ("class_names", '["cat", "dog"]', r"test_resnet as timm .* builds it: .*classifier\.weight has shape"),
        ("data_config", "{", r"not a model that `backbone-finetune train` wrote"),
        ("data_config", "[]", r"not a model that `backbone-finetune train` wrote"),
        ("data_config", "{}", r"input_size"),
    ],
)
def test_garbled_metadata_is_refused(written: Path, entry: str, text: str | None, message: str) -> None:
    _, metadata = read_checkpoint(written)
    changed = {name: value for name, value in {**metadata, entry: text}.items() if value is not None}
    save_checkpoint(make_trained().model, written, changed)
    with pytest.raises(ValueError, match=message):
        load_trained_model(written)


def test_tensors_of_another_network_are_refused(written: Path) -> None:
    _, metadata = read_checkpoint(written)
    save_checkpoint(FineTuneModel.from_timm("test_vit", num_classes=3), written, metadata)
    with pytest.raises(ValueError, match=r"test_resnet as timm .* builds it: .*missing"):
        load_trained_model(written)
