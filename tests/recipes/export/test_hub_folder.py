"""A folder in the layout of the Hugging Face hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from exported_models import make_trained, names_in
from PIL import Image

from backbone_finetune.recipes import MultiLabel, export_hub_folder
from backbone_finetune.recipes.models.file import build_transform


def test_timm_loads_the_folder_with_names_and_preprocessing(tmp_path: Path) -> None:
    trained = make_trained("test_vit", 96, img_size=96)
    exported = export_hub_folder(trained, tmp_path / "hub")
    assert names_in(tmp_path) == ["hub"]
    assert names_in(tmp_path / "hub") == ["config.json", "model.safetensors"]
    network = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    inputs = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(network(inputs), trained.model(inputs))
    assert network.pretrained_cfg["label_names"] == list(trained.class_names)
    config = timm.data.resolve_model_data_config(network)
    for name, value in trained.data_config.items():
        assert config[name] == (list(value) if name in {"mean", "std"} else value)
    assert exported.use == f"timm.create_model('local-dir:{tmp_path / 'hub'}', pretrained=True)"


def test_labels_and_values_are_refused(tmp_path: Path) -> None:
    trained = replace(make_trained(), objective=MultiLabel((0.5, 0.5, 0.5)))
    with pytest.raises(ValueError, match="as one class per image, and this model is MultiLabel; export --to onnx"):
        export_hub_folder(trained, tmp_path / "hub")
    assert names_in(tmp_path) == []


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("the user's")
    with pytest.raises(FileExistsError, match="hub exists already"):
        export_hub_folder(make_trained(), tmp_path / "hub")
    assert (tmp_path / "hub" / "config.json").read_text() == "the user's"


@pytest.mark.clients
def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained = make_trained("test_vit", 96, img_size=96)
    folder = str(export_hub_folder(trained, tmp_path / "hub").path)
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert list(network.config.id2label.values()) == list(trained.class_names)
    inputs = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(network(pixel_values=inputs).logits, trained.model(inputs))
    image = Image.effect_noise((160, 120), 80).convert("RGB")
    (found,) = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(found, build_transform(trained.data_config)(image))
