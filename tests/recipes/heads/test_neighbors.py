"""A weighted vote of nearest neighbours: the votes of DINO, and its accuracy in `evaluate` and in the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_folders import make_folder
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.data import TensorDataset

from backbone_finetune import FineTuneModel, cli
from backbone_finetune.recipes import MultiLabel, TrainedModel, predict_neighbors, save_trained_model
from backbone_finetune.recipes.data.images import IGNORED
from backbone_finetune.recipes.heads.neighbors import CHUNK


@pytest.mark.parametrize("neighbors", [1, 3, 100])
def test_votes_are_those_of_each_neighbour(neighbors: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train, asked = torch.randn(9, 4, generator=generator), torch.randn(CHUNK + 3, 4, generator=generator)
    classes = torch.arange(9) % 3
    found = predict_neighbors(TensorDataset(train, classes), asked, num_classes=3, neighbors=neighbors)
    assert len(found) == len(asked)
    for place in (0, 1, CHUNK - 1, CHUNK, CHUNK + 2):
        row, image = found[place], asked[place]
        similarity = torch.cosine_similarity(image[None], train)
        votes = torch.zeros(3)
        for index in similarity.argsort(descending=True)[:neighbors]:
            votes[classes[index]] += (similarity[index] / 0.07).exp()
        torch.testing.assert_close(row, votes / votes.sum())


def test_unreadable_images_have_no_vote() -> None:
    train = TensorDataset(torch.eye(2), torch.tensor([IGNORED, 1]))
    assert predict_neighbors(train, torch.tensor([[1.0, 0.0]]), num_classes=2).tolist() == [[0.0, 1.0]]


def test_features_that_are_no_vectors_are_refused() -> None:
    classes = torch.arange(3)
    with pytest.raises(ValueError, match=r"shapes \[\(2, 2\)\]; neighbours are found among vectors"):
        predict_neighbors(TensorDataset(torch.ones(3, 2, 2), classes), torch.ones(1, 2), num_classes=3)
    with pytest.raises(ValueError, match="neighbors"):
        predict_neighbors(TensorDataset(torch.ones(3, 2), classes), torch.ones(1, 2), num_classes=3, neighbors=0)
    with pytest.raises(ValueError, match="train: target 2 is outside the 2 classes"):
        predict_neighbors(TensorDataset(torch.ones(3, 2), classes), torch.ones(1, 2), num_classes=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make_folder(tmp_path / "data" / "train")
    make_folder(tmp_path / "data" / "test", per_class=2)
    (tmp_path / "data" / "train" / "red" / "broken.png").write_bytes(b"no image")
    return tmp_path / "data"


def save_model(path: Path, **settings: Any) -> Path:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, 32, 32)})
    save_trained_model(
        TrainedModel(model, "test_resnet", ("blue", "green", "red"), config, **settings), path, record={}
    )
    return path


def test_evaluate_measures_neighbours_in_the_training_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model.safetensors")
    assert cli.main(["evaluate", str(model), str(data), "--neighbors", str(data), "--output", "evaluation"]) == 0
    assert "\nneighbours 1.000 " in capsys.readouterr().out  # the classifier is not trained, the colours differ
    written = json.loads(Path("evaluation", "evaluation.json").read_text())
    assert written["neighbor_accuracy"]["value"] == 1.0
    assert "nearest training images" in Path("evaluation", "report.html").read_text()
    assert cli.main(["evaluate", str(model), str(data), "--output", "evaluation"]) == 0
    assert "neighbours" not in capsys.readouterr().out


def test_images_are_not_their_own_neighbours(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data / "test").rglob("*.png"):
        path.write_bytes(b"no image")  # which a prediction would report
    model = save_model(tmp_path / "model.safetensors")
    test = str(data / "test")
    assert cli.main(["evaluate", str(model), test, "--neighbors", test]) == 2
    assert "6 of its images are evaluated, and would be their own neighbours" in capsys.readouterr().err


def test_labels_have_no_neighbours(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "model.safetensors", objective=MultiLabel())
    assert cli.main(["evaluate", str(model), str(data), "--neighbors", str(data)]) == 2
    assert "--neighbors is for models of one class per image" in capsys.readouterr().err


def test_the_comparison_measures_them_on_the_cached_features(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images: dict[nn.Module, int] = {}  # that each network ran over

    def count(module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
        if type(module).__name__ == "ResNet":
            images[module] = images.get(module, 0) + len(given[0])

    arguments = ["train", str(data), "--model", "test_resnet", "--epochs", "1", "--lr", "0.1", "--baselines"]
    hook = register_module_forward_hook(count)
    try:
        assert cli.main([*arguments, "--output", "run"]) == 0
    finally:
        hook.remove()
    # The model and the random backbone over the 19 training images; the model of the neighbours on spot checks alone.
    assert sum(number >= 19 for number in images.values()) == 2
    assert json.loads(Path("run", "metrics.json").read_text())["nearest_neighbors"] == 1.0
    assert "neighbours       1.000  no classifier" in capsys.readouterr().out
