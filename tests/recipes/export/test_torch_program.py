"""torch.export programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exported_models import make_trained, names_in
from torch import nn

from backbone_finetune.recipes import MultiLabel, export_torch


def test_any_batch_size_and_the_class_names(tmp_path: Path) -> None:
    trained = replace(make_trained(), objective=MultiLabel((0.5, 0.25, 0.5)))
    exported = export_torch(trained, tmp_path / "model.pt2")
    assert names_in(tmp_path) == ["model.pt2"]
    files = {"class_names.json": "", "data_config.json": "", "objective.json": ""}
    network = torch.export.load(exported.path, extra_files=files).module()
    assert tuple(json.loads(files["class_names.json"])) == trained.class_names
    assert json.loads(files["data_config.json"])["input_size"] == [3, 64, 64]
    assert json.loads(files["objective.json"]) == {"kind": "MultiLabel", "thresholds": [0.5, 0.25, 0.5]}
    for size in (1, 5):
        inputs = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(network(inputs), trained.model(inputs))


class Branching(nn.Module):
    """Its control flow depends on values, which a graph cannot express."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3] if features.sum() > 0 else features[:, 3:6]


def test_the_error_for_an_unsupported_network_is_one_sentence(tmp_path: Path) -> None:
    trained = make_trained()
    trained.model.classifier = Branching()
    with pytest.raises(ValueError, match=r"^torch\.export cannot convert this network \(.*"):
        export_torch(trained, tmp_path / "model.pt2")
    assert names_in(tmp_path) == []
