"""Model files that were tampered with: each gives an error of one line, or a model."""

from __future__ import annotations

import json
import re
import resource
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_folders import COLOURS, make_image
from PIL import Image
from torch import nn

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes.commands.inspect import inspect_file
from backbone_finetune.recipes.commands.predict import predict
from backbone_finetune.recipes.models.file import TrainedModel, load_trained_model, save_trained_model


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("honest") / "model.safetensors"
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone()
    config = timm.data.resolve_model_data_config(model)
    save_trained_model(TrainedModel(model, "test_resnet", tuple(COLOURS), config), path, record={"seed": 0})
    return path.read_bytes()


@pytest.fixture
def nothing_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"it reached out: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("os.system", refuse)


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: object, tensors: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + tensors


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
POISON = st.sampled_from(
    [
        *("hf-hub:someone/model", "local-dir:/etc", "file:///etc/passwd", "../../etc", "vit_giant_patch14_224", ""),
        *("[" * 100_000, "9" * 5000, "NaN", "1e999", "null", "{}", "[]", json.dumps(["x"] * 100_000)),
        json.dumps({"checkpoint_path": "/etc/passwd"}),
        json.dumps({"pretrained": True}),
        json.dumps({"img_size": 10**9}),
        json.dumps({"source": "hub", "words": "w", "fingerprint": "f"}),
        json.dumps({"source": "file", "words": "/etc/passwd", "fingerprint": "f"}),
    ]
)
ENTRIES = st.sampled_from(
    ["architecture", "arguments", "class_names", "data_config", "freeze_state", "versions", "record", "base", "format"]
)


Tamper = Callable[[bytes], bytes]


@st.composite
def tampers(draw: st.DrawFn, content: bytes) -> Tamper:
    """Flip, cut or insert bytes, mostly in the header; or replace a part of it by other JSON.

    Returns a function, because hypothesis keeps what it draws, and a thousand files would be a gigabyte.
    """
    (length,) = struct.unpack("<Q", content[:8])
    way = draw(st.sampled_from(["bytes", "bytes", "cut", "insert", "tensor", "entry", "entry", "inside"]))
    position = draw(st.integers(0, 8 + length) | st.integers(0, len(content) - 1))
    if way == "bytes":
        return flip(
            draw(
                st.dictionaries(
                    st.integers(0, 7) | st.integers(0, 8 + length), st.integers(0, 255), min_size=1, max_size=4
                )
            )
        )
    if way == "cut":
        return lambda content: content[:position]
    if way == "insert":
        inserted = draw(st.binary(min_size=1, max_size=64))
        return lambda content: content[:position] + inserted + content[position:]
    header, _ = unpack(content)
    if way == "tensor":
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        other = st.sampled_from(["F64", "I32", "U8", "F8_E4M3", "X"]) | st.lists(st.integers(0, 2**63), max_size=4)
        return replace_in_header(name, draw(st.sampled_from(["dtype", "shape", "data_offsets"])), draw(JSON | other))
    metadata = header["__metadata__"]
    if way == "entry":
        text = draw(POISON | JSON.map(json.dumps) | st.text(max_size=30))
        return replace_in_header("__metadata__", draw(ENTRIES), text)
    config = json.loads(metadata["data_config"])
    config[draw(st.sampled_from(sorted(config)))] = draw(JSON)
    return replace_in_header("__metadata__", "data_config", json.dumps(config))


def flip(octets: dict[int, int]) -> Tamper:
    def tamper(content: bytes) -> bytes:
        mutable = bytearray(content)
        for position, octet in octets.items():
            mutable[position] = octet
        return bytes(mutable)

    return tamper


def replace_in_header(part: str, field: str, value: object) -> Tamper:
    def tamper(content: bytes) -> bytes:
        header, tensors = unpack(content)
        header[part][field] = value
        return pack(header, tensors)

    return tamper


def try_or_refuse(function: Callable[[Path], object], path: Path) -> str | None:
    """Read a file; return None, or the message of a ValueError, which must be one line that names the file."""
    try:
        function(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert len(message) < 2000
        assert "\n" not in message
        return message
    return None


def load_or_refuse(path: Path) -> bool:
    """Return whether a file loads; `inspect` must raise for the same files, except for errors in tensor values."""
    inspected, loaded = try_or_refuse(inspect_file, path), try_or_refuse(load_trained_model, path)
    if inspected is None:
        assert loaded is None or "not finite" in loaded or "on top of" in loaded
    else:
        assert loaded is not None
    return loaded is None


@pytest.mark.usefixtures("nothing_reached")
@pytest.mark.parametrize("files", [30, pytest.param(1000, marks=pytest.mark.zoo)])
def test_tampered_files_raise_or_load(content: bytes, tmp_path: Path, files: int) -> None:
    path = tmp_path / "model.safetensors"
    loaded_files: list[bool] = []
    slowest, largest = 0.0, 0

    @settings(
        max_examples=files,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(tampers(content))
    def load(tamper: Tamper) -> None:
        nonlocal slowest, largest
        path.write_bytes(tamper(content))
        start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loaded_files.append(load_or_refuse(path))
        slowest = max(slowest, time.process_time() - start)
        largest = max(largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)

    load()
    assert largest < 200_000  # KiB
    assert len(loaded_files) >= 0.9 * files
    assert loaded_files.count(False) > files / 2
    assert slowest < 10  # CPU seconds; the largest timm networks take some to build on the meta device


def replace_entry(content: bytes, entry: str, text: str) -> bytes:
    return replace_in_header("__metadata__", entry, text)(content)


def with_config(content: bytes, **entries: object) -> bytes:
    header, _ = unpack(content)
    return replace_entry(
        content, "data_config", json.dumps(json.loads(header["__metadata__"]["data_config"]) | entries)
    )


@pytest.mark.usefixtures("nothing_reached")
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda c: b"\x80\x04PK" + c, "not a safetensors file"),
        (lambda c: struct.pack("<Q", 2**62) + c[8:], "not a safetensors file"),
        (lambda c: struct.pack("<Q", 200_000) + b"[" * 200_000, "not a safetensors file"),
        (
            lambda c: replace_entry(c, "architecture", "hf-hub:someone/model"),
            "architecture = 'hf-hub:someone/model': timm .* has no",
        ),
        (
            lambda c: replace_entry(c, "architecture", "local-dir:/etc"),
            "architecture = 'local-dir:/etc': timm .* has no",
        ),
        (lambda c: replace_entry(c, "architecture", "resnet18.nobody"), "no weights tagged 'nobody'"),
        (
            lambda c: replace_entry(c, "arguments", '{"checkpoint_path": "/etc/passwd"}'),
            "arguments checkpoint_path = .*: extra inputs are not permitted",
        ),
        (
            lambda c: replace_entry(c, "arguments", '{"img_size": 1000000000}'),
            "arguments img_size .*less than or equal to 4096",
        ),
        (lambda c: replace_entry(c, "arguments", '{"img_size": 64}'), "timm .* cannot build test_resnet with"),
        (lambda c: replace_entry(c, "class_names", "[" * 100_000), "class_names = .*: invalid JSON"),
        (lambda c: replace_entry(c, "class_names", json.dumps([*map(str, range(100_000))])), "has shape .*100000"),
        (
            lambda c: replace_entry(c, "class_names", json.dumps(["cat\x1b[2J", "dog", "cow"])),
            "class_names = .*: control characters are not allowed",
        ),
        (
            lambda c: replace_entry(c, "class_names", json.dumps(["cat\ud800", "dog", "cow"])),
            "class_names = .*: 'utf-8' codec can't encode character '.ud800' in position 3: surrogates not allowed",
        ),
        (
            lambda c: replace_entry(c, "versions", json.dumps({"\x1b[2J": "1"})),
            "versions .*: control characters are not allowed",
        ),
        (
            lambda c: replace_entry(c, "freeze_state", '{"norm_eval": 1, "trainable": []}'),
            "freeze_state norm_eval = 1: input should be a valid boolean",
        ),
        (lambda c: replace_entry(c, "freeze_state", '{"norm_eval": true, "trainable": ["x"]}'), "trainable: 'x' is no"),
        (lambda c: replace_entry(c, "format_version", "2"), "format version '2'"),
        (lambda c: replace_entry(c, "format", "pt"), "not one of backbone-finetune"),
        (
            lambda c: with_config(c, input_size=[3, 10**9, 10**9]),
            "data_config input_size 2 = 1000000000: input should be less",
        ),
        (lambda c: with_config(c, crop_pct=1e-9), "data_config crop_pct = 1e-09: input should be greater"),
        (
            lambda c: with_config(c, input_size=[3, 4096, 4096], crop_pct=0.1),
            "images would be resized to 40,960 pixels; at most 4,096 are allowed",
        ),
        (lambda c: with_config(c, mean=[float("nan")] * 3), "data_config mean 1 = nan: input should be"),
        (lambda c: with_config(c, std=[0, 0, 0]), "data_config std 1 = .*: input should be greater"),
        (lambda c: c[:-4] + struct.pack("<f", float("nan")), "holds values that are not finite"),
    ],
)
def test_each_kind_of_damage_has_its_own_message(content: bytes, tmp_path: Path, tamper: Tamper, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tamper(content))
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load_trained_model(path)


def swap_classes(content: bytes) -> bytes:
    header, tensors = unpack(content)
    header["classifier.weight"]["shape"].reverse()
    return pack(header, tensors)


def add_tensor(content: bytes) -> bytes:
    header, tensors = unpack(content)
    header["extra"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(tensors), len(tensors) + 4]}
    return pack(header, tensors + b"more")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (swap_classes, r"classifier.weight has shape \(\d+, 3\), not \(3, \d+\)"),
        (add_tensor, "extra is unexpected"),
        (lambda c: replace_entry(c, "class_names", json.dumps([*map(str, range(100_000))])), r"has shape \(3, \d+\)"),
        (lambda c: replace_entry(c, "architecture", "test_vit"), "test_vit as timm"),
    ],
)
def test_inspect_raises_for_tensors_that_do_not_fit(
    content: bytes, tmp_path: Path, tamper: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tamper(content))
    for function in (inspect_file, load_trained_model):
        assert re.search(message, try_or_refuse(function, path) or "it was taken")


def test_an_invalid_input_size_raises_everywhere(tmp_path: Path) -> None:
    model = FineTuneModel.from_timm("vit_tiny_patch16_224", num_classes=3)
    config = timm.data.resolve_model_data_config(model)
    path = tmp_path / "model.safetensors"
    trained = TrainedModel(model, "vit_tiny_patch16_224", tuple(COLOURS), {**config, "input_size": (3, 96, 96)})
    says = "vit_tiny_patch16_224 takes no image of 3 x 96 x 96, "
    with pytest.raises(ValueError, match=f"could not be loaded again: {says}"):
        save_trained_model(trained, path, record={})
    assert not path.exists()
    save_trained_model(replace(trained, data_config=config), path, record={})
    path.write_bytes(with_config(path.read_bytes(), input_size=[3, 96, 96]))
    for function in (inspect_file, load_trained_model):
        with pytest.raises(ValueError, match=rf"model\.safetensors: {says}"):
            function(path)


def test_a_network_is_compared_on_the_meta_device_first(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    devices: list[str] = []
    build = timm.create_model

    def record(*arguments: Any, **keywords: Any) -> nn.Module:
        devices.append(torch.empty(0).device.type)
        return build(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", record)
    path.write_bytes(replace_entry(content, "architecture", "vit_giant_patch14_224"))
    with pytest.raises(ValueError, match="vit_giant_patch14_224 as timm"):
        load_trained_model(path)
    assert devices == ["meta"]
    path.write_bytes(content)
    load_trained_model(path)
    assert devices == ["meta", "meta", "cpu"]


def test_large_buffers_that_are_not_in_the_file_raise(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = timm.create_model

    def with_a_table(*arguments: Any, **keywords: Any) -> nn.Module:
        network = build(*arguments, **keywords)
        network.register_buffer("table", torch.empty(2**30), persistent=False)
        return network

    monkeypatch.setattr(timm, "create_model", with_a_table)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"would compute tables of 4,294,\d+,\d+ bytes beside its tensors"):
        load_trained_model(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("nothing_reached")
def test_an_elongated_image_is_not_resized_to_gigabytes(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_config(content, input_size=[3, 4096, 4096], crop_pct=1.0))
    trained = load_trained_model(path)
    images = [make_image(tmp_path / f"{width}.png", (0, 0, 0), size=(width, 2)) for width in (18, 200)]
    for prediction in predict(trained, images):
        assert prediction.error is not None
        assert prediction.error.startswith(f"{prediction.path}: {prediction.path.stem} x 2 pixels; ")
        assert prediction.error.endswith("at most 1 to 8.0 is allowed")

    def fail(*arguments: object, **keywords: object) -> None:
        raise MemoryError

    square = make_image(tmp_path / "square.png", (0, 0, 0))
    for part in ("resize", "convert"):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, part, fail)
            (prediction,) = predict(trained, [square])
        assert prediction.error == f"{square}: takes more memory than there is"
