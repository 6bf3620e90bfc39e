"""Networks from a folder as timm writes it for the hub: trained, inspected, and predicted with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from exported_models import make_trained
from image_folders import COLOURS, make_folder, make_image

from backbone_finetune import cli
from backbone_finetune.recipes import export_hub_folder, load_timm_model, load_trained_model, predict
from backbone_finetune.recipes.models.weights import load_network


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder of a network that was built for images of 96 pixels."""
    return export_hub_folder(make_trained("test_vit", 96, img_size=96), tmp_path / "hub").path


@pytest.fixture(params=["local-dir", "hf-hub"])
def name(hub: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name the network by its folder, relative to the current one, or by the hub, of which a download is kept."""
    if request.param == "local-dir":
        return f"local-dir:{hub.name}"
    kept = hub.with_name("cache") / "models--someone--vit"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / "abc").symlink_to(hub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(kept.parent))
    return "hf-hub:someone/vit"


def change(hub: Path, **entries: Any) -> None:
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, **entries}))


def test_predictions_are_those_of_what_was_exported(hub: Path, tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{name}.png", colour) for name, colour in COLOURS.items()]
    torch.manual_seed(0)
    trained = make_trained()
    export_hub_folder(trained, tmp_path / "resnet")
    loaded = load_timm_model(f"local-dir:{tmp_path / 'resnet'}")
    assert loaded.class_names == trained.class_names
    for one, other in zip(predict(loaded, images), predict(trained, images), strict=True):
        assert dict(one.classes) == pytest.approx(dict(other.classes))


def test_imagenet_has_its_names_without_label_names(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet")
    timm.models.save_for_hf(network, str(tmp_path / "hub"), safe_serialization=True)
    names = load_timm_model(f"local-dir:{tmp_path / 'hub'}").class_names
    assert names[0] == "tench, Tinca tinca (n01440764)"
    assert len(set(names)) == 1000


def test_a_network_without_names_is_refused(hub: Path) -> None:
    change(hub, label_names=["cat", "dog"])
    with pytest.raises(ValueError, match=r"hub: its config\.json has 2 label_names for 3 classes"):
        load_timm_model(f"local-dir:{hub}")


@pytest.mark.parametrize("command", ["inspect", "predict", "train"])
def test_a_folder_that_is_missing_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, name = str(make_folder(tmp_path / "images", per_class=2)), "local-dir:nowhere"
    arguments = {"inspect": [name], "predict": [name, images], "train": [images, "--model", name]}
    assert cli.main([command, *arguments[command]]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("backbone-finetune: error: local-dir:nowhere: timm cannot load it (Config file not found: ")


def test_train_starts_from_the_weights_of_a_folder_or_the_hub(name: str, hub: Path, tmp_path: Path) -> None:
    images, output = make_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    arguments = ["train", str(images), "--model", name, "--pretrained", "--epochs", "1", "--output", str(output)]
    assert cli.main(arguments) == 0
    loaded = load_trained_model(output / "model.safetensors")
    assert (loaded.architecture, loaded.arguments["img_size"]) == ("test_vit", [96, 96])
    assert loaded.data_config["input_size"] == (3, 96, 96)
    before = timm.create_model(f"local-dir:{hub}", pretrained=True).state_dict()
    after = loaded.model.backbone.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    recorded = json.loads((output / "run.json").read_text())["arguments"]
    assert recorded["architecture"] == name.replace(f":{hub.name}", f":{hub}")


def test_changes_alone_take_the_weights_of_the_folder_as_their_base(hub: Path, tmp_path: Path) -> None:
    images, output = make_folder(tmp_path / "images", per_class=2), tmp_path / "run"
    arguments = ["train", str(images), "--model", f"local-dir:{hub}", "--pretrained", "--trainable-only"]
    assert cli.main([*arguments, "--epochs", "1", "--output", str(output)]) == 0
    with pytest.raises(ValueError, match=r"on top of test_vit with weights of local-dir:.*give the weights file that"):
        load_trained_model(output / "model.safetensors")
    load_trained_model(output / "model.safetensors", base=hub / "model.safetensors")


def test_weights_are_random_unless_they_are_asked_for(hub: Path) -> None:
    architecture, source, words, _ = load_network(f"local-dir:{hub}")
    assert (architecture, source) == ("test_vit", "random")
    assert words == f"random weights (--pretrained loads those of local-dir:{hub})"
    with pytest.raises(ValueError, match="has weights of its own, and checkpoint x was given"):
        load_network(f"local-dir:{hub}", checkpoint=Path("x"))


def test_arguments_that_a_model_file_cannot_keep_are_refused_before_training(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(hub, model_args={"img_size": 96, "depth": 6})
    images = make_folder(tmp_path / "images", per_class=2)
    assert cli.main(["train", str(images), "--model", f"local-dir:{hub}"]) == 2
    assert "model_args that a model file cannot keep: depth = 6" in capsys.readouterr().err


def test_inspect_and_predict_take_a_folder_or_the_hub(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", name]) == 0
    assert "96 x 96" in capsys.readouterr().out.splitlines()[0]
    image = make_image(tmp_path / "image.png", (0, 0, 0))
    assert cli.main(["predict", name, str(image)]) == 0
    (answer,) = predict(load_timm_model(f"local-dir:{tmp_path / 'hub'}"), [image])
    assert f"image.png: {answer.classes[0][0]} {answer.classes[0][1]:.1%}, " in capsys.readouterr().out
