"""OpenVINO models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported_models import make_trained, names_in

from backbone_finetune.recipes import export_openvino

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
