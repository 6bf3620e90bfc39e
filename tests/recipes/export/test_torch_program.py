"""A program of torch.export."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from exported_models import make_trained, names_in

from backbone_finetune.recipes import export_torch


def test_it_takes_any_batch_and_carries_the_names(tmp_path: Path) -> None:
    trained = make_trained()
    exported = export_torch(trained, tmp_path / "model.pt2")
    assert names_in(tmp_path) == ["model.pt2"]
    files = {"class_names.json": "", "data_config.json": ""}
    network = torch.export.load(exported.path, extra_files=files).module()
    assert tuple(json.loads(files["class_names.json"])) == trained.class_names
    assert json.loads(files["data_config.json"])["input_size"] == [3, 64, 64]
    for size in (1, 5):
        inputs = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(network(inputs), trained.model(inputs))
