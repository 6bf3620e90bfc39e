"""The model file: a trained model round-trips; other files raise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from image_folders import COLOURS, make_image
from safetensors.torch import load_file, save_file
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import read_checkpoint, save_checkpoint
from backbone_finetune.recipes.commands.predict import predict
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.models.base import remember_base
from backbone_finetune.recipes.models.file import (
    TrainedModel,
    build_transform,
    load_outline,
    load_trained_model,
    save_trained_changes,
    save_trained_model,
)
from backbone_finetune.recipes.models.weights import (
    load_network,
    load_packaged_network,
)


def make_trained() -> TrainedModel:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    data_config = timm.data.resolve_model_data_config(model, args={"input_size": (3, 64, 48), "mean": (0.1, 0.2, 0.3)})
    return TrainedModel(model, "test_resnet", tuple(COLOURS), data_config)


def test_a_model_round_trips(tmp_path: Path) -> None:
    trained = make_trained()
    with torch.no_grad():  # with running statistics
        trained.model(torch.randn(4, 3, 64, 48))
    save_trained_model(trained, tmp_path / "model.safetensors", record={"seed": 3})
    loaded = load_trained_model(tmp_path / "model.safetensors")
    assert (loaded.architecture, loaded.class_names) == ("test_resnet", tuple(COLOURS))
    assert loaded.data_config == dict(trained.data_config)
    assert not loaded.model.training
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), trained.model.eval()(images))
    assert json.loads(read_checkpoint(tmp_path / "model.safetensors")[1]["record"]) == {"seed": 3}


def test_arguments_and_freeze_state_round_trip(tmp_path: Path) -> None:
    arguments = {"drop_rate": 0.3, "global_pool": "max", "img_size": [96, 64]}
    model = FineTuneModel.from_timm("test_vit", num_classes=3, norm_eval=True, **arguments)
    model.freeze_backbone(trainable_groups=1)
    config = timm.data.resolve_model_data_config(model)
    trained = TrainedModel(model, "test_vit", tuple(COLOURS), config, arguments)
    save_trained_model(trained, tmp_path / "model.safetensors", record={"loss": float("nan")})
    loaded = load_trained_model(tmp_path / "model.safetensors")
    assert loaded.arguments == arguments
    features = torch.ones(1, 64)
    assert not torch.equal(loaded.model.train().classifier(features), loaded.model.classifier(features))
    loaded.model.eval()
    assert loaded.model.norm_eval
    trains = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == trains
    assert 0 < sum(trains) < len(trains)
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), model.eval()(images))
    description, _ = load_outline(tmp_path / "model.safetensors")
    assert description.versions["timm"] == timm.__version__


def test_any_trainable_part_round_trips(tmp_path: Path) -> None:
    trained = make_trained()
    model = trained.model.freeze_backbone(trainable=[trained.model.backbone.layer1])
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    loaded = load_trained_model(tmp_path / "model.safetensors").model
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[1] for name in trains if name.startswith("backbone.")} == {"layer1"}
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == trains
    assert loaded.trainable_groups is None
    assert loaded.unfreeze_backbone().trainable_groups == len(loaded.layer_groups)


def test_a_model_that_cannot_be_loaded_is_not_written(tmp_path: Path) -> None:
    trained = make_trained()
    path = tmp_path / "model.safetensors"
    other_head = FineTuneModel.from_timm(
        "test_resnet", classifier=lambda width: nn.Sequential(nn.Linear(width, 3), nn.Tanh())
    )
    with pytest.raises(ValueError, match=r"could not be loaded again: test_resnet .*classifier\.weight is missing"):
        save_trained_model(replace(trained, model=other_head), path, record={})
    with pytest.raises(ValueError, match=r"arguments checkpoint_path = .*: extra inputs are not permitted"):
        save_trained_model(replace(trained, arguments={"checkpoint_path": "weights.pth"}), path, record={})
    with pytest.raises(ValueError, match="two classes have the same name"):
        save_trained_model(replace(trained, class_names=("a", "a", "b")), path, record={})
    assert list(tmp_path.iterdir()) == []


def save_base(path: Path, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = timm.create_model("test_resnet", num_classes=5)
    torch.save(network.state_dict(), path)
    return network


def train_a_little(model: FineTuneModel) -> None:
    """Take steps that change trainable weights and running statistics."""
    optimizer = torch.optim.SGD(model.param_groups(lr=0.1))
    model.train()
    model(torch.randn(4, 3, 64, 48)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("trainable_groups", [0, 1, 5])
def test_a_file_of_changes_loads_onto_its_base(tmp_path: Path, trainable_groups: int) -> None:
    network = save_base(tmp_path / "base.pth")
    model = FineTuneModel.from_timm(network, num_classes=3).freeze_backbone(trainable_groups=trainable_groups)
    base = remember_base(model, "file", "weights from base.pth")
    train_a_little(model)
    trained = replace(make_trained(), model=model)
    save_trained_changes(trained, base, tmp_path / "changes.safetensors", record={})
    stored = load_file(tmp_path / "changes.safetensors")
    parts = {name.split(".")[1] for name in stored if name.startswith("backbone.")}
    if trainable_groups == 0:
        assert sorted(stored) == ["classifier.bias", "classifier.weight"]
        assert (tmp_path / "changes.safetensors").stat().st_size < 5_000
    elif trainable_groups == 1:
        assert parts == {"layer4"}
        assert any("running_mean" in name for name in stored)
    else:
        assert parts == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    loaded = load_trained_model(tmp_path / "changes.safetensors", base=tmp_path / "base.pth")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_file_of_changes_raises_on_another_base(tmp_path: Path) -> None:
    model = FineTuneModel.from_timm(save_base(tmp_path / "base.pth"), num_classes=3).freeze_backbone()
    base = remember_base(model, "file", "weights from base.pth")
    path = tmp_path / "changes.safetensors"
    save_trained_changes(replace(make_trained(), model=model), base, path, record={})
    needed = "test_resnet with weights from base.pth"
    save_base(tmp_path / "other.pth", seed=1)
    with pytest.raises(ValueError, match=rf"changes.*trained on top of {needed} .*other\.pth is another base .*--base"):
        load_trained_model(path, base=tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"changes.*holds only what training changed, on top of {needed}; give the"):
        load_trained_model(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_trained_model(path, base=tmp_path / "nowhere.pth")


def test_a_whole_file_with_a_base_raises(written: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base.pth")
    with pytest.raises(ValueError, match=r"model\.safetensors: it holds the whole model, and takes no base"):
        load_trained_model(written, base=tmp_path / "base.pth")


def test_changes_of_the_packaged_weights_find_them(tmp_path: Path) -> None:
    model = FineTuneModel.from_timm(load_packaged_network(), num_classes=3).freeze_backbone()
    base = remember_base(model, "package", "ImageNet weights from a package")
    config = timm.data.resolve_model_data_config(model)
    trained = TrainedModel(model, "tf_efficientnet_lite0", tuple(COLOURS), config)
    save_trained_changes(trained, base, tmp_path / "head.safetensors", record={})
    assert (tmp_path / "head.safetensors").stat().st_size < 20_000
    loaded = load_trained_model(tmp_path / "head.safetensors").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_random_weights_as_base_raise() -> None:
    _, source, words, network = load_network("test_resnet")
    with pytest.raises(ValueError, match="the backbone starts from random weights, which cannot be built again"):
        remember_base(FineTuneModel.from_timm(network, num_classes=3), source, words)


def test_predictions_are_the_most_likely_classes_in_order(tmp_path: Path) -> None:
    trained = make_trained()
    path = make_image(tmp_path / "red.png", COLOURS["red"])
    missing = tmp_path / "missing.png"
    first, second = predict(trained, [missing, path], top_k=2)
    assert (first.path, first.classes) == (missing, ())
    assert first.error == f"{missing}: there is no such file"
    with torch.no_grad():
        logits = trained.model.eval()(build_transform(trained.data_config)(read_image(path))[None])[0]
    order = logits.argsort(descending=True).tolist()
    assert [name for name, _ in second.classes] == [trained.class_names[index] for index in order[:2]]
    expected = logits.softmax(0)[order[:2]].tolist()
    assert [share for _, share in second.classes] == pytest.approx(expected)
    assert len(next(predict(trained, [path], top_k=99)).classes) == 3


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save_trained_model(make_trained(), tmp_path / "model.safetensors", record={})
    return tmp_path / "model.safetensors"


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        load_trained_model(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_file_raises(written: Path, kept: int) -> None:
    written.write_bytes(written.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_trained_model(written)


def test_a_foreign_file_raises(written: Path) -> None:
    written.write_text("a text file that is not a model")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        load_trained_model(written)


def test_a_safetensors_file_of_other_origin_raises(written: Path) -> None:
    save_file(load_file(written), written, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*not one of backbone-finetune"):
        load_trained_model(written)


@pytest.mark.parametrize(
    ("entry", "text", "message"),
    [
        ("architecture", None, r"not a model that `backbone-finetune train` wrote.*architecture"),
        (
            "architecture",
            "hf-hub:someone/something",
            r"architecture = 'hf-hub:someone/something': timm .* has no architecture of this name",
        ),
        ("class_names", None, r"not a model that .*class_names"),
        ("class_names", '"cat"', r"class_names = '\"cat\"': expected a list of two names or more"),
        ("class_names", '["cat", "dog"]', r"test_resnet as timm .* builds it .*: .*classifier\.weight has shape"),
        ("data_config", "{", r"not a model that `backbone-finetune train` wrote"),
        ("data_config", "[]", r"not a model that `backbone-finetune train` wrote"),
        ("data_config", "{}", r"input_size"),
    ],
)
def test_invalid_metadata_raises(written: Path, entry: str, text: str | None, message: str) -> None:
    _, metadata = read_checkpoint(written)
    changed = {name: value for name, value in {**metadata, entry: text}.items() if value is not None}
    save_checkpoint(make_trained().model, written, changed)
    with pytest.raises(ValueError, match=message):
        load_trained_model(written)


def test_tensors_of_another_network_raise(written: Path) -> None:
    _, metadata = read_checkpoint(written)
    save_checkpoint(FineTuneModel.from_timm("test_vit", num_classes=3), written, metadata)
    with pytest.raises(ValueError, match=r"test_resnet as timm .* builds it .*: .*missing"):
        load_trained_model(written)
