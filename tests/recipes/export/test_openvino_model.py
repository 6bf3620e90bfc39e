"""OpenVINO models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_models import make_trained, names_in

from backbone_finetune.recipes import MultiLabel, export_openvino

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.clients


def test_any_batch_size_and_the_class_names(tmp_path: Path) -> None:
    trained = make_trained()
    exported = export_openvino(trained, tmp_path / "model.xml")
    assert names_in(tmp_path) == ["model.bin", "model.xml"]
    model = openvino.Core().read_model(exported.path)
    assert model.get_rt_info(["model_info", "labels"]).astype(str) == "1 10 2"
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in (1, 5):
        inputs = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            found = torch.from_numpy(compiled(inputs.numpy())[0])
            torch.testing.assert_close(found, trained.model(inputs), atol=1e-4, rtol=1e-4)


def test_preprocessing_and_objective_and_names_of_any_bytes(tmp_path: Path) -> None:
    trained = replace(make_trained(), class_names=("a cat", "b\udcff", "c"), objective=MultiLabel((0.5, 0.25, 0.5)))
    model = openvino.Core().read_model(export_openvino(trained, tmp_path / "model.xml").path)
    assert model.get_rt_info(["model_info", "labels"]).astype(str) == r"a_cat b\udcff c"
    info = {
        name: json.loads(model.get_rt_info(["backbone_finetune", name]).astype(str))
        for name in ("class_names", "data_config", "objective")
    }
    assert tuple(info["class_names"]) == trained.class_names
    assert info["data_config"]["input_size"] == [3, 64, 64]
    assert info["objective"] == {"kind": "MultiLabel", "thresholds": [0.5, 0.25, 0.5]}
