"""Checkpoints: atomic writes, and clear errors for foreign files."""

from __future__ import annotations

import copy
import os
import re
import resource
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.checkpoint import load_tensors, read_checkpoint, save_checkpoint


def test_buffers_and_metadata_round_trip(tmp_path: Path) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).train()
    model(torch.randn(2, 3, 32, 32))
    save_checkpoint(model, tmp_path / "model.safetensors", {"classes": "a,b,c"})
    tensors, metadata = read_checkpoint(tmp_path / "model.safetensors")
    assert metadata == {"classes": "a,b,c"}
    fresh = FineTuneModel.from_timm("test_resnet", num_classes=3)
    load_tensors(fresh, tensors)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in fresh.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        module[1].weight = module[0].weight
        return module

    model, fresh = build(), build()
    save_checkpoint(model, tmp_path / "tied.safetensors", {})
    tensors, _ = read_checkpoint(tmp_path / "tied.safetensors")
    assert sorted(tensors) == ["0.bias", "0.weight", "1.bias"]
    load_tensors(fresh, tensors)
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh[1].weight, model[1].weight)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(nn.Linear(2, 2), path, {"run": "old"})
    monkeypatch.setattr("os.replace", lambda *arguments: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(nn.Linear(2, 2), path, {"run": "new"})
    assert read_checkpoint(path)[1] == {"run": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_is_an_os_error_that_names_the_folder(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as if the disk had 1,000 bytes left
    try:
        with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path))}: cannot write .*; free disk space"):
            save_checkpoint(nn.Linear(100, 10), tmp_path / "model.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


def test_truncated_foreign_and_missing_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(nn.Linear(2, 2), path, {})
    whole = path.read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a safetensors file, or a truncated one"):
            read_checkpoint(path)
    path.write_bytes(b"this is a text file, whatever it is called" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_checkpoint(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"not one of backbone-finetune; pass the model\.safetensors"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "absent.safetensors")


def test_tensors_that_do_not_fit_raise_and_change_nothing() -> None:
    model = nn.Linear(2, 1)
    before = model.weight.clone()
    for tensors, message in (
        ({"weight": torch.ones(1, 2)}, "bias is missing"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(1), "extra": torch.ones(1)}, "extra is unexpected"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(2)}, r"bias has shape \(2,\), not \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tensors(model, tensors)
        assert torch.equal(model.weight, before)


def test_cached_attention_biases_are_not_stale_after_a_load() -> None:
    model = FineTuneModel(timm.create_model("levit_128s", num_classes=0), nn.Linear(384, 2)).eval()
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        load_tensors(model, other.state_dict())
        assert not any(module.training for module in model.modules())
        assert not torch.allclose(other(images), before)
        assert torch.equal(model(images), other(images))


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_checkpoint(nn.Linear(2, 2), tmp_path / "model.safetensors", {})
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
