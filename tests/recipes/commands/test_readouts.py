"""`train --readout` and `--head`: the model file holds them, and predict, evaluate, inspect and export follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from image_folders import COLOURS, make_folder, make_image

from backbone_finetune import TokenReadout, cli
from backbone_finetune.recipes import load_trained_model

HEADS = {"batchnorm-linear": "BatchNorm1d", "mlp": "GELU"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "images", per_class=8)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def train(images: Path, output: Path, *options: object) -> int:
    small = ("--model", "test_vit", "--input-size", "32", "--epochs", "2")
    return run("train", images, *small, "--output", output, *options)


def test_a_readout_of_blocks_goes_through_every_command(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(images, tmp_path / "run", "--readout", "last-4-blocks-mean", "--head", "mlp", "--baselines") == 0
    printed = capsys.readouterr()
    assert "features are not cached" not in printed.err
    refused = "export:   test_vit: timm's own network has features of one token or their mean"
    assert printed.out.index(refused) < printed.out.index("test accuracy")
    model = tmp_path / "run" / "model.safetensors"
    loaded = load_trained_model(model).model
    assert isinstance(loaded.backbone, TokenReadout)
    assert (loaded.backbone.blocks, loaded.backbone.patch_mean) == (4, True)
    assert [type(layer).__name__ for layer in loaded.classifier.children()] == ["Linear", "GELU", "Linear"]
    assert all(group.name.startswith("network.") for group in loaded.layer_groups)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["random_backbone"] is not None
    assert run("predict", model, images / "red" / "0.png") == 0
    assert run("evaluate", model, images, "--output", tmp_path / "evaluation") == 0
    assert run("inspect", model) == 0
    printed = capsys.readouterr()
    assert "makes 320 features" in printed.out
    assert "network.blocks.5" in printed.out
    assert run("export", model, "plain.safetensors", "--to", "timm") == 2
    assert "so a trained model cannot be exported to timm or hub-folder" in capsys.readouterr().err
    assert run("export", model, "program.pt2", "--to", "torch-export") == 0


def test_it_is_trained_further_on_the_same_and_on_other_classes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--readout", "token-mean", "--head", "batchnorm-linear")
    assert train(images, tmp_path / "first", *options, "--trainable-groups", "1") == 0
    first = tmp_path / "first" / "model.safetensors"
    assert run("train", images, "--checkpoint", first, "--epochs", "1", "--output", tmp_path / "second") == 0
    two = tmp_path / "two"
    for name in sorted(COLOURS)[:2]:
        for index in range(5):
            make_image(two / name / f"{index}.png", COLOURS[name], seed=index)
    assert run("train", two, "--checkpoint", first, "--epochs", "1", "--output", tmp_path / "third") == 0
    for name, count in (("second", 3), ("third", 2)):
        model = load_trained_model(tmp_path / name / "model.safetensors").model
        assert isinstance(model.backbone, TokenReadout)
        assert (type(model.classifier[0]).__name__, model.num_classes) == ("BatchNorm1d", count)  # type: ignore[index]
    capsys.readouterr()
    assert run("train", images, "--checkpoint", first, "--head", "mlp", "--output", tmp_path / "fourth") == 2
    assert "has the readout and the head it was trained with; leave out --readout and --head" in capsys.readouterr().err


def test_the_mean_is_exported_to_plain_timm(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path / "run", "--readout", "mean") == 0
    assert "export:" not in capsys.readouterr().out
    trained = load_trained_model(tmp_path / "run" / "model.safetensors")
    assert trained.arguments == {"img_size": 32, "global_pool": "avg", "fc_norm": False}
    assert run("export", tmp_path / "run" / "model.safetensors", "plain.safetensors", "--to", "timm") == 0
    assert "global_pool='avg', fc_norm=False, img_size=32, checkpoint_path=" in capsys.readouterr().out
    assert run("export", tmp_path / "run" / "model.safetensors", "folder", "--to", "hub-folder") == 0
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network = timm.create_model("local-dir:folder", pretrained=True).eval()
        torch.testing.assert_close(network(inputs), trained.model(inputs))
    assert run("predict", "local-dir:folder", images / "red" / "0.png") == 0
    assert (
        run("train", images, "--model", "local-dir:folder", "--pretrained", "--readout", "token", "--output", "t") == 0
    )
    again = load_trained_model(Path("t", "model.safetensors"))
    assert again.arguments == {"img_size": [32, 32], "global_pool": "token", "fc_norm": False}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_says_before_the_training_that_timm_cannot_hold_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    small = ("--model", "test_resnet", "--input-size", "32", "--epochs", "1")
    assert run("train", images, *small, "--head", head, "--output", tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert printed.index("export:   test_resnet: timm's own network has one linear layer as its classifier") < (
        printed.index("test accuracy")
    )
    model = tmp_path / "run" / "model.safetensors"
    assert HEADS[head] in str(load_trained_model(model).model.classifier)
    assert run("export", model, "plain.safetensors", "--to", "timm") == 2
    assert "cannot be exported to timm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "test_resnet", "--readout", "token-mean"], "ResNet has no class token"),
        (
            ["--model", "test_resnet", "--readout", "token"],
            "leave out --readout, which keeps the network's own pooling",
        ),
        (["--model", "test_vit_relpos", "--readout", "last-4-blocks"], "has no class token"),
    ],
)
def test_a_network_without_the_tokens_is_refused(
    images: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run("train", images, *options) == 2
    assert message in capsys.readouterr().err
    assert not Path("fine-tuned").exists()


def test_a_changed_readout_is_another_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path / "run", "--readout", "token") == 0
    recorded: dict[str, Any] = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (recorded["arguments"]["readout"], recorded["arguments"]["head"]) == ("token", None)
    assert (
        run("train", "--run", tmp_path / "run" / "run.json", "--readout", "mean", "--output", tmp_path / "other") == 2
    )
    assert "--readout and --run" in capsys.readouterr().err


def test_standardized_features_are_folded_into_a_plain_classifier(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", "test_resnet", "--epochs", "3", "--standardize", "--output", tmp_path / "run")
    assert run("train", images, *arguments) == 0
    model = tmp_path / "run" / "model.safetensors"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_accuracy"] == 1.0
    assert type(load_trained_model(model).model.classifier) is torch.nn.Linear
    assert run("evaluate", model, images, "--output", tmp_path / "evaluation") == 0
    assert "accuracy 1.000" in capsys.readouterr().out
    assert run("export", model, "plain.safetensors", "--to", "timm") == 0


@pytest.mark.clients
@pytest.mark.parametrize("options", [("--readout", "last-4-blocks", "--head", "mlp"), ("--head", "batchnorm-linear")])
def test_it_is_exported_to_onnx(images: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert train(images, tmp_path / "run", *options) == 0
    assert run("export", tmp_path / "run" / "model.safetensors", "model.onnx", "--to", "onnx") == 0
    assert run("evaluate", "model.onnx", images) == 0
