"""A small trained model to export, and an image to compare it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import TrainedModel


def make_trained(architecture: str = "test_resnet", side: int = 64, **arguments: Any) -> TrainedModel:
    """Build a model of three classes in the order of their folders, whose logits differ between images."""
    model = FineTuneModel.from_timm(architecture, num_classes=3, **arguments)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.normal_()
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, side, side)})
    return TrainedModel(model.eval(), architecture, ("1", "10", "2"), config, arguments)


def names_in(folder: Path) -> list[str]:
    """Name all that is in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())
