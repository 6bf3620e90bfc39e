"""ONNX files, with and without preprocessing in the graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from exported_models import make_trained, names_in
from PIL import Image

from backbone_finetune import FineTuneModel, cli
from backbone_finetune.recipes import (
    TrainedModel,
    evaluate_images,
    export_onnx,
    load_onnx_model,
    predict,
    save_trained_model,
)
from backbone_finetune.recipes.commands.settings import CLIPART
from backbone_finetune.recipes.data.images import read_image
from backbone_finetune.recipes.export.checks import converting
from backbone_finetune.recipes.export.onnx_preprocessing import build_preprocessing
from backbone_finetune.recipes.models.file import build_transform
from backbone_finetune.recipes.models.inputs import resolve_data_config
from backbone_finetune.recipes.objectives.kinds import MultiLabel, Regression
from backbone_finetune.recipes.objectives.objective import Objective

pytestmark = pytest.mark.clients
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
IMAGES = sorted(CLIPART.rglob("*.jpg"))[::60]


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    torch.manual_seed(0)
    return make_trained()


@pytest.fixture(scope="module")
def plain(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(trained, tmp_path_factory.mktemp("plain") / "model.onnx").path


@pytest.fixture(scope="module")
def whole(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    exported = export_onnx(trained, path, images=IMAGES, preprocessing=True)
    assert 0 < exported.difference < 0.01 * exported.largest
    assert exported.images == len(IMAGES)
    return path


def run(path: Path, name: str, values: Any) -> torch.Tensor:
    (logits,) = onnxruntime.InferenceSession(str(path)).run(["logits"], {name: numpy.asarray(values)})
    return torch.from_numpy(logits)


def test_without_preprocessing_a_batch_has_any_size(plain: Path, trained: TrainedModel) -> None:
    assert names_in(plain.parent) == ["model.onnx"]
    for size in (1, 5):
        inputs = torch.randn(size, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(run(plain, "input", inputs), trained.model(inputs), atol=1e-4, rtol=1e-4)


def test_the_opset_is_the_one_that_torch_recommends(plain: Path, whole: Path) -> None:
    with converting("torch.onnx"):
        program = torch.onnx.export(torch.nn.Linear(1, 1), (torch.zeros(1, 1),), dynamo=True, verbose=False)
    assert program is not None
    for path in (plain, whole):
        versions = {each.domain: each.version for each in onnx.load(path).opset_import}
        assert versions[""] == program.model_proto.opset_import[0].version


def test_with_preprocessing_images_have_any_size(whole: Path, trained: TrainedModel) -> None:
    transform = build_transform(trained.data_config)
    for path in IMAGES:
        image = read_image(path)
        pair = numpy.stack([image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
        with torch.no_grad():
            expected = trained.model(transform(image)[None])[0]
        assert (run(whole, "image", pair)[0] - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(96, 96), (64, 48), (224, 224)])
def test_preprocessing_equals_timms(interpolation: str, crop_mode: str, size: tuple[int, int]) -> None:
    config = {"input_size": (3, *size), "crop_pct": 0.9, "interpolation": interpolation, "crop_mode": crop_mode}
    config |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    graph = build_preprocessing(config)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for path, shape in zip(IMAGES, ((300, 200), (71, 113), (64, 64), (33, 20)), strict=False):
        image = read_image(path).resize(shape)
        (found,) = session.run(None, {"image": numpy.asarray(image)[None]})
        scale = torch.tensor(config["std"])[:, None, None]
        off = (torch.from_numpy(found[0]) - build_transform(config)(image)).abs() * scale
        assert off.max() < 2.1 / 255
        assert off.mean() < 0.1 / 255


def test_unsupported_preprocessing_is_refused(tmp_path: Path, trained: TrainedModel) -> None:
    other = replace(trained, data_config={**trained.data_config, "interpolation": "lanczos"})
    with pytest.raises(ValueError, match=r"lanczos, center and 0\.95; export without preprocessing"):
        export_onnx(other, tmp_path / "model.onnx", preprocessing=True)
    assert names_in(tmp_path) == []


def test_the_file_has_no_paths_of_this_machine(plain: Path, whole: Path) -> None:
    for path in (plain, whole):
        assert b"site-packages" not in path.read_bytes()
        assert b".py" not in path.read_bytes()
        onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.parametrize("tta", [False, True])
def test_predictions_equal_the_models(plain: Path, whole: Path, trained: TrainedModel, tta: bool) -> None:
    expected = list(predict(trained, IMAGES, tta=tta, batch_size=4))
    for path, tolerance in ((plain, 1e-4), (whole, 0.02)):
        found = list(predict(load_onnx_model(path), IMAGES, tta=tta, batch_size=4))
        assert [answer.path for answer in found] == IMAGES
        for one, other in zip(found, expected, strict=True):
            assert dict(one.classes) == pytest.approx(dict(other.classes), abs=tolerance)


def test_evaluation_equals_the_models(plain: Path, trained: TrainedModel, tmp_path: Path) -> None:
    for index, path in enumerate(IMAGES):
        target = tmp_path / "images" / trained.class_names[index % 3] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    scores = [
        evaluate_images(each, tmp_path / "images", show_progress=False) for each in (load_onnx_model(plain), trained)
    ]
    assert scores[0].confusion == scores[1].confusion
    assert scores[0].classes == scores[1].classes
    probabilities = [torch.from_numpy(each.answers.probabilities) for each in scores]
    torch.testing.assert_close(*probabilities, atol=1e-4, rtol=0)


@pytest.mark.parametrize("objective", [MultiLabel((0.4, 0.5, 0.45)), Regression((100.0,), (20.0,))])
def test_predictions_of_labels_and_values_equal_the_models(
    objective: Objective, trained: TrainedModel, tmp_path: Path
) -> None:
    other = replace(trained, objective=objective)
    loaded = load_onnx_model(export_onnx(other, tmp_path / "model.onnx").path)
    assert loaded.objective == objective
    for one, expected in zip(predict(loaded, IMAGES), predict(other, IMAGES), strict=True):
        assert dict(one.classes) == pytest.approx(dict(expected.classes), abs=1e-4)
        assert dict(one.values) == pytest.approx(dict(expected.values), abs=1e-2)
        assert one.values or isinstance(objective, MultiLabel)


def test_other_files_are_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.onnx: not a readable ONNX file"):
        load_onnx_model(tmp_path / "text.onnx")
    with pytest.raises(FileNotFoundError, match=r"none\.onnx: there is no such file"):
        load_onnx_model(tmp_path / "none.onnx")
    model = onnx.load(plain)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ValueError, match=r"foreign\.onnx: not a file of `backbone-finetune export --to onnx`"):
        load_onnx_model(tmp_path / "foreign.onnx")


def test_the_command_line_exports_and_predicts(
    trained: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_trained_model(trained, tmp_path / "model.safetensors", record={})
    images = [str(path) for path in IMAGES[:3]]
    arguments = ["export", "model.safetensors", "whole.onnx", "--to", "onnx", "--preprocessing", "--images", *images]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("on 3 of your images")
    lines = []
    for model in ("model.safetensors", "whole.onnx"):
        assert cli.main(["predict", model, *images, "--top-k", "1"]) == 0
        lines.append([line.split()[:2] for line in capsys.readouterr().out.splitlines()])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 3
    assert cli.main(["predict", "whole.onnx", *images, "--device", "cuda"]) == 2
    assert "an ONNX file runs on the CPU" in capsys.readouterr().err


def make_model_of_channels(channels: int) -> TrainedModel:
    network = timm.create_model("test_resnet", in_chans=channels)
    model = FineTuneModel.from_timm(network, num_classes=2).eval()
    config = resolve_data_config(network, (64, 64))
    return TrainedModel(model, "test_resnet", ("cat", "dog"), config, {"in_chans": channels})


@pytest.mark.parametrize("preprocessing", [False, True])
def test_a_grey_model_takes_grey_images(tmp_path: Path, preprocessing: bool) -> None:
    trained = make_model_of_channels(1)
    exported = export_onnx(trained, tmp_path / "model.onnx", images=IMAGES, preprocessing=preprocessing)
    loaded = load_onnx_model(exported.path)
    for one, other in zip(predict(loaded, IMAGES), predict(trained, IMAGES), strict=True):
        assert dict(one.classes) == pytest.approx(dict(other.classes), abs=0.02 if preprocessing else 1e-4)
    Image.fromarray(numpy.full((80, 80), 1000, dtype="uint16")).save(tmp_path / "16.png")
    (answer,) = predict(loaded, [tmp_path / "16.png"])
    if preprocessing:
        assert "16.png: more than 8 bits per channel, and a model with preprocessing takes 8" in str(answer.error)
    else:
        (expected,) = predict(trained, [tmp_path / "16.png"])
        assert dict(answer.classes) == pytest.approx(dict(expected.classes), abs=1e-4)


def test_bands_take_no_preprocessing(tmp_path: Path) -> None:
    trained = make_model_of_channels(5)
    with pytest.raises(
        ValueError, match="grey or RGB images of 8 bits, and this model has 5 channels; export without it"
    ):
        export_onnx(trained, tmp_path / "model.onnx", preprocessing=True)
    numpy.save(tmp_path / "bands.npy", numpy.random.default_rng(0).random((80, 90, 5), dtype="float32"))
    exported = export_onnx(trained, tmp_path / "model.onnx", images=[tmp_path / "bands.npy"])
    (answer,), (expected,) = (
        predict(each, [tmp_path / "bands.npy"]) for each in (load_onnx_model(exported.path), trained)
    )
    assert dict(answer.classes) == pytest.approx(dict(expected.classes), abs=1e-4)
