"""A folder in the layout of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from exported_models import make_trained, names_in

from backbone_finetune.recipes import export_hub_folder


def test_timm_loads_it_with_names_and_preprocessing(tmp_path: Path) -> None:
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


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("the user's")
    with pytest.raises(FileExistsError, match="hub exists already"):
        export_hub_folder(make_trained(), tmp_path / "hub")
    assert (tmp_path / "hub" / "config.json").read_text() == "the user's"
