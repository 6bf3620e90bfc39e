"""``--input-size`` and ``--in-chans``: from training to the model file, predictions, evaluation and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from exported_models import make_trained
from PIL import Image

from backbone_finetune.cli import main
from backbone_finetune.recipes import (
    TrainSettings,
    load_timm_model,
    load_trained_model,
    make_accelerator,
    predict,
    save_trained_model,
)
from backbone_finetune.recipes.commands.setup import Task, make_task
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.models.file import build_transform
from backbone_finetune.recipes.models.foreign import load_checkpoint_network
from backbone_finetune.recipes.models.inputs import input_arguments, resolve_data_config
from backbone_finetune.recipes.models.metadata import DataConfig
from backbone_finetune.recipes.models.weights import load_packaged_network

SIDE = 24
PACKAGED: list[dict[str, int]] = [{}, {"in_chans": 1}, {"in_chans": 5}]


def draw(level: float, channels: int, seed: int) -> Any:
    """Draw bands of float64 from 0 to 1, brighter with the level."""
    noise = numpy.random.default_rng(seed).uniform(-0.1, 0.1, (SIDE, SIDE, channels))
    return (noise + level).clip(0, 1)


def write_folder(root: Path, write: Callable[[Path, Any], None], channels: int) -> Path:
    for name, level in (("dark", 0.2), ("light", 0.8)):
        for index in range(5):
            path = root / name / str(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, draw(level, channels, index))
    return root


def write_grey_8(path: Path, values: Any) -> None:
    Image.fromarray((values[..., 0] * 255).astype("uint8")).save(f"{path}.png")


def write_grey_16(path: Path, values: Any) -> None:
    Image.fromarray((values[..., 0] * 65535).astype("uint16")).save(f"{path}.png")


def write_npy(path: Path, values: Any) -> None:
    numpy.save(path, values.astype("float32"))


def write_rgba_tiff(path: Path, values: Any) -> None:
    Image.fromarray((values * 255).astype("uint8"), "RGBA").save(f"{path}.tif", compression="tiff_lzw")


def write_rgb(path: Path, values: Any) -> None:
    Image.fromarray((values * 255).astype("uint8")).save(f"{path}.png")


def train(images: Path, output: Path, *options: str, model: str = "test_resnet") -> Path:
    arguments = ["train", str(images), "--model", model, "--epochs", "1", "--lr", "0.01", "--device", "cpu"]
    assert main([*arguments, "--batch-size", "4", "--output", str(output), *options]) == 0
    return output / "model.safetensors"


def start(images: Path, output: Path, **settings: Any) -> Task:
    """Find images and build the model of a run, without training it."""
    return make_task(
        TrainSettings(images=images, output=output / "run", **settings), make_accelerator(torch.device("cpu"))
    )


CASES = {  # how images are written, their bands, the options, the network and its input
    "grey, 8 bits": (write_grey_8, 1, ["--in-chans", "1", "--input-size", "32"], "test_resnet", (1, 32, 32)),
    "grey, 16 bits": (write_grey_16, 1, ["--in-chans", "1", "--input-size", "32"], "test_resnet", (1, 32, 32)),
    "npy of 5 bands": (write_npy, 5, ["--in-chans", "5", "--input-size", "32x48"], "test_resnet", (5, 32, 48)),
    "TIFF of 4 bands": (write_rgba_tiff, 4, ["--in-chans", "4", "--input-size", "48"], "test_vit", (4, 48, 48)),
    "a convnet's size": (write_rgb, 3, ["--input-size", "32x64"], "test_resnet", (3, 32, 64)),
    "a ViT's size": (write_rgb, 3, ["--input-size", "48x64"], "test_vit", (3, 48, 64)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_input_is_followed_from_training_to_evaluation(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, drawn, options, model, size = CASES[case]
    images = write_folder(tmp_path / "images", write, drawn)
    path = train(images, tmp_path / "run", *options, model=model)
    trained = load_trained_model(path)
    assert tuple(trained.data_config["input_size"]) == size
    assert len(trained.data_config["mean"]) == len(trained.data_config["std"]) == size[0]
    assert 'src="data:,"' not in (tmp_path / "run" / "report.html").read_text()

    output = capsys.readouterr()
    assert "skipped" not in output.out + output.err
    assert main(["predict", str(path), str(images), "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["evaluate", str(path), str(images), "--output", str(tmp_path / "evaluation")]) == 0
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert (evaluation["images"], evaluation["skipped_images"]) == (10, [])

    # Predictions are those of the transform and the network, step by step.
    files = sorted(file for file in images.rglob("*") if file.is_file())
    transform = build_transform(trained.data_config)
    inputs = torch.stack([transform(read_image(file, size[0])) for file in files])
    assert inputs.shape == (10, *size)
    with torch.no_grad():
        expected = trained.model(inputs).softmax(1)
    for line, row in zip(lines, expected.tolist(), strict=True):
        shown = dict(part.rsplit(" ", 1) for part in line.rpartition(": ")[2].split(", "))
        found = {name: float(share.rstrip("%")) for name, share in shown.items()}
        assert found == pytest.approx(
            dict(zip(("dark", "light"), (100 * share for share in row), strict=True)), abs=0.1
        )


@pytest.fixture(scope="module")
def bands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of 5 bands, and a run on them with a ViT for another size than its own."""
    root = tmp_path_factory.mktemp("bands")
    images = write_folder(root / "images", write_npy, 5)
    train(images, root / "run", "--in-chans", "5", "--input-size", "48x64", "--views", "2", model="test_vit3")
    return root


def test_the_run_is_repeated_from_its_record(bands: Path, tmp_path: Path) -> None:
    run = bands / "run"
    assert main(["train", "--run", str(run / "run.json"), "--output", str(tmp_path / "again")]) == 0
    one, other = (load_trained_model(folder / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert one.data_config == other.data_config
    assert one.arguments == other.arguments == {"in_chans": 5, "img_size": [48, 64]}
    tensors = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(first, second) for first, second in tensors)
    assert json.loads((run / "metrics.json").read_text())["data_config"]["input_size"] == [5, 48, 64]


def test_inspect_names_the_input(bands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bands / "run" / "model.safetensors")]) == 0
    assert "makes 96 features of an image of 5 x 48 x 64" in capsys.readouterr().out


def test_timms_own_formats_keep_the_input(bands: Path, tmp_path: Path) -> None:
    path, images = bands / "run" / "model.safetensors", bands / "images"
    assert main(["export", str(path), str(tmp_path / "hub"), "--to", "hub-folder", "--images", str(images)]) == 0
    assert main(["export", str(path), str(tmp_path / "plain.safetensors"), "--to", "timm"]) == 0
    trained, loaded = load_trained_model(path), load_timm_model(f"local-dir:{tmp_path / 'hub'}")
    assert json.loads(json.dumps(loaded.data_config)) == json.loads(json.dumps(trained.data_config))
    files = sorted(images.rglob("*.npy"))
    for one, other in zip(predict(loaded, files), predict(trained, files), strict=True):
        assert one.error is None
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=1e-5)
    task = start(images, tmp_path, architecture=f"local-dir:{tmp_path / 'hub'}", pretrained=True)  # to train further
    assert task.arguments.items() >= {"in_chans": 5, "img_size": [48, 64]}.items()
    assert json.loads(json.dumps(task.data_config)) == json.loads(json.dumps(trained.data_config))


def test_a_model_file_is_trained_further_on_its_own_input_alone(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bands / "run" / "model.safetensors"
    arguments = ["train", str(bands / "images"), "--checkpoint", str(path), "--epochs", "1", "--lr", "0.01"]
    arguments += ["--output", str(tmp_path / "run")]
    for options, message in (
        (["--in-chans", "3"], "is a model of 5 channels; leave out --in-chans, or choose other weights"),
        (["--input-size", "64"], "is a model of images of 48 x 64 pixels, and takes no others"),
    ):
        assert main([*arguments, *options]) == 2
        assert message in capsys.readouterr().err
    task = start(bands / "images", tmp_path, checkpoint=path, in_chans=5, input_size=(48, 64))
    assert task.data_config["input_size"] == (5, 48, 64)


def test_a_convnets_file_is_trained_further_on_another_size(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "images", write_rgb, 3)
    save_trained_model(make_trained("test_resnet", 32), tmp_path / "model.safetensors", record={})
    task = start(images, tmp_path, checkpoint=tmp_path / "model.safetensors", input_size=64)
    assert task.data_config["input_size"] == (3, 64, 64)
    assert task.train[0][0].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("test_vit", ["--input-size", "8"], "test_vit takes no images of 3 channels and 8 x 8 pixels"),
        ("test_vit", ["--input-size", "0"], "input_size"),
        ("test_resnet", ["--input-size", "4000"], "images would be resized to 4,211 pixels; at most 4,096"),
        ("test_resnet", ["--in-chans", "0"], "in_chans"),
        ("csatv2", ["--in-chans", "5"], "csatv2 takes no images of 5 channels and 512 x 512 pixels"),
        (
            "test_resnet",
            ["--in-chans", "1", "--augment", "strong"],
            "change colours of three channels",
        ),
        ("test_resnet", ["--in-chans", "5"], "3 bands; the model takes 5; train one with --in-chans 3"),
    ],
)
def test_what_a_network_cannot_take_is_refused_before_any_work(
    model: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "images", write_rgb, 3)
    assert main(["train", str(images), "--model", model, "--output", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.5] * 3}, "3 means and 5 standard deviations of 5 channels"),
        ({"crop_mode": "border"}, "crop mode border of 5 channels"),
        ({"interpolation": "lanczos"}, "other numbers than 3 take bilinear or bicubic"),
        ({"input_size": [2000, 32, 32]}, "input_size"),
    ],
)
def test_a_file_of_channels_that_do_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    config = resolve_data_config(timm.create_model("test_resnet", in_chans=5))
    DataConfig.model_validate_json(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate_json(json.dumps({**config, **changes}))


def test_sizes_that_fit_are_named() -> None:
    message = r"test_vit takes no images of 3 channels and 1 x 50 pixels .*; its own are of 3 and 160 x 160; "
    with pytest.raises(ValueError, match=f"{message}32 x 32 and 32 x 64 would fit"):
        input_arguments("test_vit", (1, 50), None)


def test_some_misfits_are_skipped_and_only_misfits_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_folder(tmp_path / "images", write_npy, 5)
    for name in ("dark", "light"):
        Image.new("RGB", (SIDE, SIDE)).save(images / name / "photo.png")
    train(images, tmp_path / "run", "--in-chans", "5", "--input-size", "32")
    assert "skipped          2 broken images" in capsys.readouterr().out
    path = tmp_path / "run" / "model.safetensors"
    assert main(["predict", str(path), str(images / "dark")]) == 2
    assert "photo.png: 3 bands; the model takes 5; train one with --in-chans 3" in capsys.readouterr().err
    for name in ("dark", "light"):
        (images / name / "photo.png").unlink()
    assert main(["train", str(images), "--output", str(tmp_path / "other")]) == 2
    assert "0.npy: 5 bands; the model takes 3; train one with --in-chans 5" in capsys.readouterr().err


def test_pretrained_weights_are_adapted_as_timm_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=7)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    images = write_folder(tmp_path / "images", write_grey_8, 1)
    options = ["--checkpoint", str(tmp_path / "weights.pth"), "--in-chans", "1", "--input-size", "64"]
    changes = train(images, tmp_path / "changes", *options, "--trainable-only", model="test_vit")
    assert changes.stat().st_size < (tmp_path / "weights.pth").stat().st_size / 4
    backbone: Any = load_trained_model(changes, base=tmp_path / "weights.pth").model.backbone
    kernel = network.patch_embed.proj.weight
    assert torch.equal(backbone.patch_embed.proj.weight, kernel.sum(1, keepdim=True))
    positions = timm.layers.resample_abs_pos_embed(network.pos_embed, (4, 4), num_prefix_tokens=1)
    assert torch.equal(backbone.pos_embed, positions)


def test_weights_of_other_channels_load_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("test_resnet", in_chans=5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded: Any = load_checkpoint_network("test_resnet", tmp_path / "weights.pth", in_chans=5)
    assert torch.equal(loaded.conv1[0].weight, network.conv1[0].weight)
    assert not caplog.messages
    with pytest.raises(ValueError, match=r"its first layer takes images of 5 channels; pass --in-chans 5"):
        load_checkpoint_network("test_resnet", tmp_path / "weights.pth", in_chans=4)


def test_the_packaged_weights_are_adapted() -> None:
    colour, grey, five = (load_packaged_network(**arguments).conv_stem.weight for arguments in PACKAGED)
    assert torch.allclose(grey, colour.sum(1, keepdim=True), atol=1e-6)
    assert torch.allclose(five, colour[:, [0, 1, 2, 0, 1]] * 3 / 5, atol=1e-6)


def test_mean_and_std_of_other_channels_are_the_average_of_the_weights_own() -> None:
    network = timm.create_model("resnet18", in_chans=4)
    config = resolve_data_config(network, (64, 32))
    assert config["input_size"] == (4, 64, 32)
    assert config["mean"] == pytest.approx([(0.485 + 0.456 + 0.406) / 3] * 4)
    assert config["std"] == pytest.approx([(0.229 + 0.224 + 0.225) / 3] * 4)
    assert resolve_data_config(timm.create_model("resnet18"))["mean"] == (0.485, 0.456, 0.406)
