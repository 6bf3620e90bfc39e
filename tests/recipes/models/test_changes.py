"""The base weights of a file of changes are found on this machine or raise; nothing is downloaded."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import huggingface_hub
import pytest
import timm
import torch
from image_folders import COLOURS
from safetensors.torch import save_file
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import read_checkpoint, save_tensors
from backbone_finetune.recipes.models.base import remember_base
from backbone_finetune.recipes.models.file import (
    TrainedModel,
    describe_model_file,
    load_trained_model,
    save_trained_changes,
)
from backbone_finetune.recipes.models.readouts import choose_readout
from backbone_finetune.recipes.models.weights import load_network

HUGE, ITS_FEATURES = "vit_huge_patch14_clip_224.laion2b", 1280


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty hub cache, and raise for any network connection."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"it reached out: {arguments}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path / "hub"


def fill_cache(cache: Path, architecture: str, tensors: Mapping[str, torch.Tensor], name: str) -> Path:
    """Put weights into the cache of huggingface_hub."""
    repository = cache / f"models--{timm.get_pretrained_cfg(architecture).hf_hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    path = repository / "snapshots" / ("0" * 40) / name
    path.parent.mkdir(parents=True)
    if name.endswith(".safetensors"):
        save_file(dict(tensors), path)
    else:
        torch.save(dict(tensors), path)
    return path


def save_changes(
    path: Path, network: nn.Module, architecture: str, arguments: Mapping[str, object] = MappingProxyType({})
) -> FineTuneModel:
    """Write a file of changes on the hub's weights, and return the whole model."""
    model = FineTuneModel.from_timm(network, num_classes=3).freeze_backbone()
    base = remember_base(model, "hub", "timm's pretrained weights")
    config = timm.data.resolve_model_data_config(model)
    save_trained_changes(TrainedModel(model, architecture, tuple(COLOURS), config, arguments), base, path, record={})
    return model


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_weights_in_the_hubs_cache_are_found(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, name: str
) -> None:
    fill_cache(hub_cache, architecture, timm.create_model(architecture).state_dict(), name)
    with monkeypatch.context() as patch:  # as `train --pretrained` loads them
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        *_, network = load_network(architecture, pretrained=True)
    model = save_changes(tmp_path / "head.safetensors", network, architecture)
    loaded = load_trained_model(tmp_path / "head.safetensors").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_in_the_cache_are_not_downloaded(hub_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    model = save_changes(path, timm.create_model("test_resnet"), "test_resnet")
    says = (
        r"head\.safetensors: it holds only what training changed, on top of test_resnet with timm's pretrained "
        r"weights; they are not in the cache .*; fetch them with timm\.create_model\('test_resnet', pretrained=True\)"
    )
    with pytest.raises(ValueError, match=says):
        load_trained_model(path)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is another base"):
        load_trained_model(path, base=tmp_path / "other.pth")
    backbone = {name.partition(".")[2]: tensor for name, tensor in model.state_dict().items() if "backbone" in name}
    torch.save(backbone, tmp_path / "base.pth")
    load_trained_model(path, base=tmp_path / "base.pth")


def test_a_base_may_have_the_pooling_that_a_readout_replaced(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit3").state_dict(), tmp_path / "base.pth")  # it has an attention pooling
    *_, network = load_network("test_vit3", checkpoint=tmp_path / "base.pth")
    arguments, _ = choose_readout("mean", network, "test_vit3", {})
    model = save_changes(tmp_path / "head.safetensors", network, "test_vit3", arguments)
    loaded = load_trained_model(tmp_path / "head.safetensors", base=tmp_path / "base.pth").model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_a_foreign_safetensors_file_is_no_model_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(timm.create_model("test_resnet").state_dict(), path, metadata)
        assert describe_model_file(path) is None
    path.write_bytes(path.read_bytes()[:1000])
    assert describe_model_file(path) is None


def test_a_damaged_model_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors({"weight": torch.ones(2)}, path, {"class_names": "[]"})
    with pytest.raises(ValueError, match=r"model\.safetensors: not a model that `backbone-finetune train` wrote; arch"):
        describe_model_file(path)


def write_hostile_file(path: Path) -> None:
    """Write a small file that names a network of 2.5 gigabytes, with its weights on the hub."""
    network = timm.create_model("test_vit")
    save_changes(path, network, "test_vit")
    tensors, metadata = read_checkpoint(path)
    tensors = {"classifier.weight": torch.zeros(3, ITS_FEATURES), "classifier.bias": torch.zeros(3)}
    config = json.loads(metadata["data_config"]) | {"input_size": [3, 224, 224]}
    freeze_state = json.dumps({"norm_eval": False, "trainable": []})
    changed = {"architecture": HUGE, "data_config": json.dumps(config), "freeze_state": freeze_state}
    save_tensors(tensors, path, {**metadata, **changed})
    assert path.stat().st_size < 50_000


def test_a_small_file_uses_little_memory_and_no_network(hub_cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    write_hostile_file(path)
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"on top of {HUGE} .*not in the cache of the hub"):
        load_trained_model(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.process_time() - start < 10


def test_text_of_a_base_is_safe_to_print(tmp_path: Path) -> None:
    network, path = timm.create_model("test_resnet"), tmp_path / "head.safetensors"
    model = FineTuneModel.from_timm(network, num_classes=3).freeze_backbone()
    base = remember_base(model, "file", "weights from \x1b[2J\udcff.pth")
    config = timm.data.resolve_model_data_config(model)
    save_trained_changes(TrainedModel(model, "test_resnet", tuple(COLOURS), config), base, path, record={})
    with pytest.raises(ValueError, match=r"with weights from \ufffd\[2J\\udcff\.pth; give the"):
        load_trained_model(path)
