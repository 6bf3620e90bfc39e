"""A whole training run: its files, errors before any work, and files that it does not change."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import COLOURS, make_folder, make_image
from raising_hooks import is_pixel_baseline, raising, trains
from recorded_files import opened_files, record_files
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from backbone_finetune import cli
from backbone_finetune.files import replacing
from backbone_finetune.recipes.commands.initial_model import choose_data_config
from backbone_finetune.recipes.commands.predict import predict
from backbone_finetune.recipes.commands.runs.metrics import describe
from backbone_finetune.recipes.commands.runs.run_folder import MODEL_FILE
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.commands.train import train
from backbone_finetune.recipes.data.augmentation import Augmentation
from backbone_finetune.recipes.data.groups import split
from backbone_finetune.recipes.data.sources.finding import find_images
from backbone_finetune.recipes.models.file import load_trained_model
from backbone_finetune.recipes.training.phases import Phase

FILES = {"curves.png", "metrics.json", "model.safetensors", "predictions.csv", "report.html", "run.json"}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "images": make_folder(tmp_path / "images"),
        "architecture": "test_resnet",
        "input_size": 32,
        "phases": (Phase(epochs=2),),
        "batch_size": 8,
        "output": tmp_path / "runs" / "first",
        "device": "cpu",
    }


@pytest.fixture
def unbuildable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose network cannot be built: errors that come before it show that no work was done."""
    return {**settings, "architecture": "no_such_network"}


@pytest.mark.parametrize(
    ("asked", "expected"),  # of the test images, too
    [
        ({}, {torch.bfloat16}),
        ({"mixed_precision": "no"}, {torch.float32}),
        ({"cache": "off"}, {torch.float32}),
        ({"phases": (Phase(epochs=2, augment=Augmentation.LIGHT),)}, {torch.float32}),
        ({"phases": (Phase(epochs=2, augment=Augmentation.LIGHT),), "views": 2}, {torch.bfloat16}),
        ({"phases": (Phase(epochs=2, mixup=0.2),)}, {torch.float32}),
    ],
)
def test_features_are_in_float32_if_asked_for_and_the_accuracy_says_their_precision(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], expected: set[torch.dtype]
) -> None:
    computed: set[torch.dtype] = set()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Conv2d) and not output.is_meta:
            computed.add(output.dtype)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    handle = register_module_forward_hook(record)
    try:
        metrics = train(TrainSettings(**{**settings, **asked}))
    finally:
        handle.remove()
    assert computed == expected
    assert ("features in bf16, predict: float32" in describe(metrics)) == (expected == {torch.bfloat16})


def test_a_model_that_a_device_trained_predicts_there_and_on_the_cpu(
    settings: dict[str, Any], device: torch.device
) -> None:
    settings["phases"] = (Phase(epochs=2), Phase(epochs=2, trainable_groups=1))
    metrics = train(TrainSettings(**{**settings, "device": device.type, "mixed_precision": "no"}))
    assert torch.device(metrics.device).type == device.type
    paths = sorted(settings["images"].rglob("*.png"))

    def probabilities(where: torch.device) -> Tensor:
        trained = load_trained_model(settings["output"] / MODEL_FILE)
        trained.model.to(where)
        return torch.tensor([[value for _, value in sorted(answer.classes)] for answer in predict(trained, paths)])

    torch.testing.assert_close(probabilities(device), probabilities(torch.device("cpu")), rtol=1e-3, atol=1e-3)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_writes_model_metrics_and_curves(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings["baselines"] = True
    (settings["images"] / "red" / "broken.png").write_bytes(b"")
    random_state = torch.get_rng_state()
    with cli.show_log():
        metrics = train(TrainSettings(**settings))
    assert torch.equal(torch.get_rng_state(), random_state)
    output = settings["output"]
    assert names_in(output) == FILES

    written = json.loads((output / "metrics.json").read_text())
    assert all(0 <= written[name] <= 1 for name in ("test_accuracy", "chance", "random_backbone", "raw_pixels"))
    assert written["test_accuracy"] == metrics.test_accuracy
    assert written["history"][-1]["validation_accuracy"] is None
    assert written["chance"] == pytest.approx(1 / 3)
    assert (written["train_images"], written["test_images"]) == (12, 6)
    assert written["class_names"] == list(COLOURS)
    assert (written["seed"], written["batch_size"], written["processes"]) == (0, 8, 1)
    assert [phase["epochs"] for phase in written["phases"]] == [2]
    assert written["backward_milliseconds"]["frozen"] < written["backward_milliseconds"]["unfrozen"]
    (skipped,) = written["skipped_images"]
    assert skipped.startswith(str(settings["images"] / "red" / "broken.png"))

    loaded = load_trained_model(output / MODEL_FILE)
    assert loaded.class_names == tuple(COLOURS)
    printed = capsys.readouterr()
    assert "classifier         291  trainable  train" in printed.out
    share, error = metrics.test_accuracy, (metrics.test_accuracy * (1 - metrics.test_accuracy) / 6) ** 0.5
    expected = f"test accuracy    {share:.3f}  of 6 images, standard error {error:.3f}"
    assert expected.replace(" 0.", " .") in printed.out
    assert "train: 13 images from " in printed.out
    assert "\nskipped          1 broken image, named above\n\nwrote " in printed.out
    for name in ("test accuracy", "chance", "random backbone", "raw pixels", "backward"):
        assert f"\n{name}  " in printed.out
    assert all(str(output / name) in printed.out for name in FILES)
    assert printed.err.count(f"skipped: {skipped}") == 1
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_in_python_a_run_logs_and_does_not_print(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="backbone_finetune")
    train(TrainSettings(**settings))
    assert capsys.readouterr().out == ""
    assert "test accuracy" in caplog.text


def test_the_written_model_has_the_reported_accuracy(settings: dict[str, Any]) -> None:
    metrics = train(TrainSettings(**{**settings, "phases": (Phase(epochs=2, lr=0.01),)}))
    _, test = split(find_images(settings["images"]), test_share=0.3, seed=0)
    loaded = load_trained_model(settings["output"] / MODEL_FILE)
    predictions = [prediction.classes[0][0] for prediction in predict(loaded, test.paths, top_k=1)]
    expected = [path.parent.name for path in test.paths]
    right = sum(found == name for found, name in zip(predictions, expected, strict=True))
    assert right / len(expected) == metrics.test_accuracy


def test_the_model_is_written_before_the_baselines_run(settings: dict[str, Any]) -> None:
    settings["baselines"] = True
    with raising(RuntimeError("a fault"), is_pixel_baseline), pytest.raises(RuntimeError, match="a fault"):
        train(TrainSettings(**settings))
    assert names_in(settings["output"]) == {"run.json", MODEL_FILE, "metrics.json", ".unfinished"}
    before = load_trained_model(settings["output"] / MODEL_FILE).model.state_dict()
    train(TrainSettings(**settings))
    assert names_in(settings["output"]) == FILES
    after = load_trained_model(settings["output"] / MODEL_FILE).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_run_that_diverges_fails(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = settings["output"]
    command = ["train", str(settings["images"]), "--model", "test_resnet", "--epochs", "2", "--output", str(output)]
    for _ in range(2):  # the same command fails in the same way
        assert cli.main([*command, "--lr", "1e38"]) == 2
        assert re.fullmatch(
            r"backbone-finetune: error: the training diverged at lr = 1e\+38: .* became (nan|inf|infinite or nan) in "
            r"epoch [12]; pass a lower --lr \(in Python: Phase\(lr=\.\.\.\)\); .*first keeps this run: "
            "--overwrite replaces it, or pass another folder with --output",
            capsys.readouterr().err.splitlines()[-1],
        )
        assert names_in(output) == {".unfinished"}
    assert cli.main([*command, "--lr", "0.01"]) == 2
    assert "(phases 1 lr: 1e+38 there, 0.01 here)" in capsys.readouterr().err
    assert cli.main([*command, "--lr", "0.01", "--overwrite"]) == 0
    assert names_in(output) == FILES


@pytest.mark.parametrize(("asked", "expected"), [(None, False), (False, False), (True, True)])
def test_baselines_on_a_users_images_are_optional(
    settings: dict[str, Any], asked: bool | None, expected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="backbone_finetune")
    metrics = train(TrainSettings(**{**settings, "baselines": asked}))
    found = (metrics.random_backbone, metrics.raw_pixels, metrics.backward_milliseconds)
    assert [value is not None for value in found] == [expected] * 3
    assert set(metrics.references()) == (
        {"chance", "random backbone", "raw pixels", "neighbours"} if expected else {"chance"}
    )
    assert ("raw pixels       " in caplog.text) == expected


def test_layer_groups_train(settings: dict[str, Any]) -> None:
    settings["baselines"] = True
    metrics = train(TrainSettings(**{**settings, "phases": (Phase(epochs=1), Phase(epochs=1, trainable_groups=2))}))
    assert [result.epoch for result in metrics.history] == [1, 2]
    assert metrics.backward_milliseconds.frozen > metrics.backward_milliseconds.classifier_alone
    assert names_in(settings["output"]) == FILES


def test_the_cache_does_not_change_the_result(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "backbone_finetune")
    phases = (Phase(epochs=1), Phase(epochs=2, trainable_groups=2))
    settings |= {"phases": phases, "mixed_precision": "no"}
    runs = {}
    for cache in ("auto", "memory", "disk", "off"):
        caplog.clear()
        output = tmp_path / cache
        metrics = train(TrainSettings(**{**settings, "output": output, "cache": cache}))
        runs[cache] = load_trained_model(output / MODEL_FILE).model.state_dict()
        assert names_in(output) == FILES
        announced = [message for message in caplog.messages if message.startswith("caching backbone.")]
        assert len(announced) == (cache != "off")
        assert len(metrics.history) == 3
    for cache in ("memory", "disk"):
        assert all(torch.equal(tensor, runs[cache][name]) for name, tensor in runs["auto"].items())
    torch.testing.assert_close(runs["off"], runs["auto"], rtol=0.02, atol=0.01)
    assert "cache" not in json.loads((tmp_path / "disk" / "run.json").read_text())["arguments"]


def test_views_are_augmented_and_seeded(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"phases": (Phase(epochs=1, lr=0.01), Phase(epochs=1, trainable_groups=1))}
    runs = []
    for number, (views, seed) in enumerate([(1, 0), (3, 0), (3, 0), (3, 1)]):
        output = tmp_path / str(number)
        train(TrainSettings(**{**settings, "views": views, "seed": seed, "output": output}))
        runs.append(load_trained_model(output / MODEL_FILE).model.state_dict())
    assert all(torch.equal(tensor, runs[2][name]) for name, tensor in runs[1].items())
    for other in (runs[0], runs[3]):
        assert not torch.equal(other["classifier.weight"], runs[1]["classifier.weight"])


def test_the_same_seed_gives_the_same_run(settings: dict[str, Any], tmp_path: Path) -> None:
    def outcome(name: str, seed: int, *, baselines: bool = True) -> Any:
        output = tmp_path / name
        metrics = train(TrainSettings(**{**settings, "output": output, "seed": seed, "baselines": baselines}))
        weights = load_trained_model(output / MODEL_FILE).model.state_dict()
        return metrics.history, metrics.random_backbone, metrics.raw_pixels, weights

    *first, first_weights = outcome("first", 0)
    *second, second_weights = outcome("second", 0)
    assert first == second
    assert all(torch.equal(tensor, second_weights[name]) for name, tensor in first_weights.items())
    assert outcome("third", 1, baselines=False)[0] != first[0]


def test_a_finished_model_raises_before_any_work(unbuildable: dict[str, Any]) -> None:
    unbuildable["output"].mkdir(parents=True)
    (unbuildable["output"] / MODEL_FILE).write_text("the first model")
    with pytest.raises(
        FileExistsError, match=r"first already holds model\.safetensors; pass --overwrite to replace it"
    ):
        train(TrainSettings(**unbuildable))
    assert (unbuildable["output"] / MODEL_FILE).read_text() == "the first model"


def test_a_finished_model_is_kept_until_the_new_one_replaces_it(settings: dict[str, Any]) -> None:
    settings["output"].mkdir(parents=True)
    for name in FILES:
        (settings["output"] / name).write_text("the first")
    with raising(KeyboardInterrupt(), trains), pytest.raises(KeyboardInterrupt):
        train(TrainSettings(**settings, overwrite=True))
    assert {(settings["output"] / name).read_text() for name in FILES} == {"the first"}
    train(TrainSettings(**settings, overwrite=True))
    assert json.loads((settings["output"] / "metrics.json").read_text())["class_names"] == list(COLOURS)
    assert (settings["output"] / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert load_trained_model(settings["output"] / MODEL_FILE).class_names == tuple(COLOURS)
    assert names_in(settings["output"]) == FILES


def test_an_output_that_is_a_file_raises_before_any_work(unbuildable: dict[str, Any], tmp_path: Path) -> None:
    path = make_image(tmp_path / "one.png", (0, 0, 0))
    with pytest.raises(FileExistsError, match=r"one\.png is a file; pass a folder with --output"):
        train(TrainSettings(**{**unbuildable, "output": path}))


@pytest.mark.parametrize("folders", [(), ("cat",)])
def test_invalid_images_raise_before_any_work(
    unbuildable: dict[str, Any], tmp_path: Path, folders: tuple[str, ...]
) -> None:
    images = tmp_path / "unfit"
    images.mkdir()
    for name in folders:
        make_image(images / name / "1.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"unfit has (no sub-folders|one class only \(cat\)); expected a folder"):
        train(TrainSettings(**{**unbuildable, "images": images}))
    assert not unbuildable["output"].exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases": (Phase(), Phase(trainable_groups=9))},
            r"trainable_groups=9: the backbone has 5 layer groups \(stem, layer1, .*\); pass 0 to 5",
        ),
        (
            {"architecture": "test_resnot"},
            r"test_resnot: timm .* has no such architecture; the nearest names are test_resnet",
        ),
        ({"device": "cuda:99"}, r"device 'cuda:99': not on this machine, which has cpu"),
        ({"device": "gpu"}, r"device 'gpu': not on this machine, which has cpu"),
        ({"checkpoint": Path(__file__)}, r"test_train\.py: not a readable weights file of torch or safetensors"),
        ({"folds": 99}, r"folds = 99: expected a whole number from 2 to the 12 images"),
    ],
)
def test_invalid_settings_read_one_image_at_most_and_write_nothing(
    settings: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with opened_files() as names, pytest.raises(ValueError, match=message):
        train(TrainSettings(**{**settings, **changes}))
    assert len({name for name in names if name.endswith(".png")}) <= 1  # whose channels are checked
    assert not settings["output"].exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": ()}, r"phases\n +Tuple should have at least 1 item"),
        ({"batch_size": 0}, r"batch_size\n +Input should be greater than or equal to 1"),
        ({"accumulation": 0}, r"accumulation\n +Input should be greater than or equal to 1"),
        ({"checkpoint_steps": 0}, r"checkpoint_steps\n +Input should be greater than or equal to 1"),
        ({"seed": 2**63}, rf"seed\n +Input should be less than {2**63}"),
        ({"mixed_precision": "fp8"}, r"mixed_precision\n +Input should be 'no', 'fp16' or 'bf16'"),
    ],
)
def test_settings_out_of_range_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**changes)


def test_missing_matplotlib_raises_before_any_work(
    unbuildable: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"matplotlib is not installed; run: pip install 'backbone-finetune\[recipes\]'"
    ):
        train(TrainSettings(**unbuildable))


def test_an_incomplete_file_never_replaces_a_complete_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("whole")

    def write_half() -> None:
        with replacing(tmp_path / "metrics.json") as temporary:
            temporary.write_text("ha")
            raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        write_half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("metrics.json", "whole")]


def test_replacing_follows_a_link_and_writes_to_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "target.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("target.csv")
    with replacing(tmp_path / "link.csv") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "new"

    os.mkfifo(tmp_path / "pipe")
    descriptor = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as temporary:
        temporary.write_text("through")
    assert os.read(descriptor, 100) == b"through"
    os.close(descriptor)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are named there")
def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = record_files(monkeypatch)
    with replacing(tmp_path / "metrics.json") as temporary:
        temporary.write_text("whole")
        assert events == []
    name = temporary.name
    assert events == [f"sync {name}", f"move {name} metrics.json", f"sync {tmp_path.name}"]


def test_fixed_input_sizes_are_kept_and_clipart_images_are_small() -> None:
    from backbone_finetune import FineTuneModel  # noqa: PLC0415

    flexible = FineTuneModel.from_timm("test_resnet", num_classes=2)
    fixed = FineTuneModel.from_timm("test_vit", num_classes=2)
    size = {
        (name, small): choose_data_config(model, small=small)["input_size"]
        for name, model in (("flexible", flexible), ("fixed", fixed))
        for small in (True, False)
    }
    assert size == {
        ("flexible", True): (3, 96, 96),
        ("flexible", False): (3, 160, 160),
        ("fixed", True): (3, 160, 160),
        ("fixed", False): (3, 160, 160),
    }
