"""Tables of images with labels or values: training, model files, predictions and evaluation."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from image_folders import COLOURS
from PIL import Image
from torch import Tensor

from backbone_finetune.cli import main
from backbone_finetune.recipes import Metrics, TrainSettings, find_splits, load_trained_model, predict, train
from backbone_finetune.recipes.commands.evaluate import evaluate_images
from backbone_finetune.recipes.commands.reporting.evaluation_files import write_evaluation
from backbone_finetune.recipes.commands.reporting.figures import order_errors
from backbone_finetune.recipes.commands.runs.metrics import describe
from backbone_finetune.recipes.commands.setup import choose_objective
from backbone_finetune.recipes.data.images import ImageDataset, read_image
from backbone_finetune.recipes.data.loading import DeviceLoader
from backbone_finetune.recipes.data.sources.parts import find_data
from backbone_finetune.recipes.models.file import TrainedModel, build_transform
from backbone_finetune.recipes.models.metadata import parse_metadata
from backbone_finetune.recipes.objectives.kinds import MultiLabel, Regression, SingleLabel, SoftLabels
from backbone_finetune.recipes.training.phases import Phase

PARTS = ["train"] * 48 + ["val"] * 16 + ["test"] * 16
SMALL: dict[str, Any] = {"architecture": "test_resnet", "input_size": 32, "device": "cpu", "mixed_precision": "no"}
SMALL |= {"baselines": False}


def write_table(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 80 images: a coloured square for each label, the third one rare, and a gray level for the value."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    rows: list[dict[str, object]] = []
    for index, part in enumerate(PARTS):
        drawn = torch.rand(3, generator=generator) < torch.tensor([0.5, 0.5, 0.25])
        grey = int(torch.randint(0, 200, (), generator=generator))
        image = Image.new("RGB", (32, 32), (grey, grey, grey))
        labels = [name for name, is_drawn in zip(COLOURS, drawn.tolist(), strict=True) if is_drawn]
        for place, name in enumerate(COLOURS):
            if name in labels:
                image.paste(COLOURS[name], (10 * place, 0, 10 * place + 10, 16))
        image.save(root / f"{index}.png")
        row: dict[str, object] = {"path": f"{index}.png", "labels": ";".join(labels), "split": part}
        rows.append({**row, "grey": 1000 + 10 * grey, "count": len(labels)})
    write_table(root / "table.csv", rows)
    write_table(root / "whole.csv", [{"path": row["path"], "labels": row["labels"]} for row in rows])
    return root


def run(root: Path, output: Path, **settings: Any) -> Metrics:
    phases = (Phase(epochs=12),)
    return train(TrainSettings(**{**SMALL, "images": root / "table.csv", "phases": phases, **settings}, output=output))


@pytest.fixture(scope="module")
def labelled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("labels") / "run"
    return folder, run(images, folder)


@pytest.fixture(scope="module")
def valued(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Metrics]:
    folder = tmp_path_factory.mktemp("values") / "run"
    return folder, run(images, folder, regression=("grey", "count"))


def outputs_of(trained: TrainedModel, paths: Sequence[Path]) -> Tensor:
    transform = build_transform(trained.data_config)
    with torch.no_grad():
        return trained.model.eval()(torch.stack([transform(read_image(path)) for path in paths]))


def test_labels_of_a_table_are_rows(tmp_path: Path) -> None:
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    rows: list[dict[str, object]] = [
        {"path": "a.png", "labels": "dog; cat", "split": "train"},
        {"path": "b.png", "labels": "", "split": "train"},
        {"path": "c.png", "labels": "emu|cat|", "split": "train"},
        {"path": "d.png", "labels": "emu", "split": "val"},
    ]
    parts = find_splits(write_table(tmp_path / "table.csv", rows))
    assert parts["train"].class_names == parts["validation"].class_names == ("cat", "dog", "emu")
    found = dict(zip((path.name for path in parts["train"].paths), parts["train"].targets, strict=True))
    assert found == {"a.png": (1, 1, 0), "b.png": (0, 0, 0), "c.png": (1, 0, 1)}
    assert parts["validation"].targets == ((0, 0, 1),)
    data = ImageDataset(parts["validation"], lambda image: torch.zeros(3))
    assert data[0][1].tolist() == [0, 0, 1]
    assert data[0][1].dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "values", "message"),
    [
        ([{"path": "a.png", "labels": ""}], (), "no row has labels"),
        (
            [{"path": "a.png", "labels": "cat", "label": "cat"}],
            (),
            "its columns are path, labels, label; expected one of",
        ),
        ([{"path": "a.png", "labels": "c\x1b[2J"}], (), r"class 'c\\x1b\[2J' has control characters"),
        (
            [{"path": "a.png", "age": "3"}, {"path": "a.png", "age": "old"}],
            ("age",),
            "line 3: age is 'old'; expected a",
        ),
        ([{"path": "a.png", "age": "inf"}], ("age",), "line 2: age is 'inf'; expected a finite number"),
        ([{"path": "a.png", "age": ""}], ("age",), "line 2: no age; fill it in"),
        ([{"path": "a.png", "age": "3"}], ("age", "size"), "no column size; its columns are path, age"),
    ],
)
def test_an_invalid_table_is_refused(
    rows: list[dict[str, object]], values: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        find_splits(write_table(tmp_path / "table.csv", rows), values=values)


@pytest.mark.parametrize(
    ("column", "labels", "hint"),
    [
        ("labels", ["cat", "dog"], "each image has one label; name the column label to train one class per image"),
        ("labels", ["cat", "cat;dog"], None),
        ("labels", ["cat", ""], None),
        ("label", ["cat", "cat;dog"], "cat;dog is one class; name the column labels to train its labels"),
        ("label", ["cat", "dog"], None),
        ("label", ["0.5", "-.25"], "-.25 is one class; --regression COLUMN predicts numbers"),
        ("label", ["0.5", "1"], None),
    ],
)
def test_a_column_that_seems_to_be_misnamed_is_named(
    column: str, labels: list[str], hint: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, object]] = []
    for index, label in enumerate(labels * 4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append({"path": f"{index}.png", column: label})
    table = write_table(tmp_path / "table.csv", rows)
    find_data(table, test_share=0.3, seed=0)
    assert caplog.messages == ([] if hint is None else [f"{table}: {hint}"])


def test_an_unknown_label_is_refused(images: Path, labelled: tuple[Path, Metrics], tmp_path: Path) -> None:
    row: dict[str, object] = {"path": str(images / "0.png"), "labels": "blue;pink"}
    with pytest.raises(ValueError, match="pink: not a class of this model, whose classes are blue, green, red"):
        evaluate_images(
            load_trained_model(labelled[0] / "model.safetensors"), write_table(tmp_path / "other.csv", [row])
        )


def test_labels_are_trained_with_thresholds_chosen_on_validation_images(
    images: Path, labelled: tuple[Path, Metrics]
) -> None:
    folder, metrics = labelled
    assert metrics.class_names == ("blue", "green", "red")
    assert (metrics.train_images, metrics.validation_images, metrics.test_images) == (48, 16, 16)
    assert metrics.test_metrics["mean_average_precision"] > 0.6
    assert metrics.best_epoch is not None
    best = max(metrics.history, key=lambda result: result.validation_metrics["mean_average_precision"])
    assert metrics.validation_metrics == best.validation_metrics
    written = json.loads((folder / "metrics.json").read_text())
    assert written["test_metrics"] == metrics.test_metrics
    assert written["test_metrics"].keys() == {"mean_average_precision", "mean_auroc", "macro_f1"}
    precision, area = (metrics.validation_metrics[name] for name in ("mean_average_precision", "mean_auroc"))
    line = f"validation       mean average precision {precision:.4g}, mean auroc {area:.4g}  of 16 images"
    assert line in describe(metrics).splitlines()
    trained = load_trained_model(folder / "model.safetensors")
    assert isinstance(trained.objective, MultiLabel)
    assert written["objective"] == {"kind": "MultiLabel", "thresholds": list(trained.objective.thresholds or ())}
    parts = find_splits(images / "table.csv")
    outputs = outputs_of(trained, parts["validation"].paths)
    chosen = MultiLabel().choose_thresholds(outputs.sigmoid(), torch.tensor(parts["validation"].targets))
    assert trained.objective.thresholds == pytest.approx(chosen.thresholds, rel=1e-3, abs=1e-6)


def test_predict_returns_the_labels_above_their_thresholds(
    images: Path, labelled: tuple[Path, Metrics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = labelled[0] / "model.safetensors"
    trained, paths = load_trained_model(model), [images / f"{index}.png" for index in range(64, 80)]
    probabilities = outputs_of(trained, paths).sigmoid()
    above = probabilities > torch.tensor(trained.objective.thresholds)  # type: ignore[attr-defined]
    assert above.any(1).sum() not in {0, len(paths)}  # some have no label
    predictions = list(predict(trained, paths, top_k=1))
    for prediction, chances, is_above in zip(predictions, probabilities, above, strict=True):
        named = {name: float(chance) for name, chance, is_one in zip(COLOURS, chances, is_above, strict=True) if is_one}
        assert dict(prediction.classes) == pytest.approx(named, abs=1e-5)
        assert [name for name, _ in prediction.classes] == sorted(named, key=lambda name: -named[name])
    assert main(["predict", str(model), *map(str, paths), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, prediction in zip(lines, predictions, strict=True):
        shown = ", ".join(f"{name} {share:.1%}" for name, share in prediction.classes) or "no label"
        assert line == f"{prediction.path}: {shown}"
    written = tmp_path / "labels.csv"
    assert main(["predict", str(model), *map(str, paths), "no.png", "--device", "cpu", "--output", str(written)]) == 2
    with written.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "labels", "probabilities", "error"]
    assert [row["labels"] for row in rows] == [
        *(";".join(name for name, _ in prediction.classes) for prediction in predictions),
        "",
    ]
    assert rows[-1]["error"] == "no.png: there is no such file"


def test_evaluate_returns_the_metrics_of_the_test_images(
    images: Path, labelled: tuple[Path, Metrics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = labelled
    given = [str(folder / "model.safetensors"), str(images / "table.csv"), "--device", "cpu"]
    assert main(["evaluate", *given, "--output", str(tmp_path / "evaluation")]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert evaluation["images"] == 16
    assert evaluation["metrics"] == pytest.approx({**metrics.test_metrics, "accuracy": metrics.test_accuracy}, rel=1e-6)
    scores = {score["name"]: score for score in evaluation["outputs"]}
    targets = find_splits(images / "table.csv")["test"].targets
    assert [scores[name]["support"] for name in COLOURS] == [sum(row[label] for row in targets) for label in range(3)]
    assert evaluation["metrics"]["macro_f1"] == pytest.approx(sum(score["f1"] for score in scores.values()) / 3)
    assert evaluation["metrics"]["mean_auroc"] == pytest.approx(sum(score["auroc"] for score in scores.values()) / 3)
    rows = [[name, f1, threshold] for name, _, f1, threshold, *_ in map(str.split, printed.splitlines()[1:4])]
    for score in scores.values():
        assert score["f1"] == pytest.approx(2 * score["correct"] / (score["support"] + score["predicted"]))
        assert [score["name"], f"{score['f1']:.3f}", f"{score['threshold']:.2f}"] in rows


def test_without_a_split_thresholds_are_chosen_on_held_out_images(images: Path, tmp_path: Path) -> None:
    short = (Phase(epochs=1, lr=0.01),)
    metrics = run(images, tmp_path / "run", images=images / "whole.csv", phases=short)
    assert (metrics.train_images, metrics.validation_images, metrics.test_images) == (45, 11, 24)
    assert metrics.objective is not None
    assert metrics.objective["thresholds"] is not None
    metrics = run(images, tmp_path / "off", images=images / "whole.csv", monitor="off", phases=short)
    assert (metrics.validation_images, metrics.objective) == (0, {"kind": "MultiLabel", "thresholds": None})


def test_values_are_trained_predicted_and_evaluated(
    images: Path, valued: tuple[Path, Metrics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = valued
    assert metrics.class_names == ("grey", "count")
    assert metrics.test_metrics["r2"] > 0.5
    assert (metrics.test_accuracy, metrics.validation_accuracy, metrics.chance) == (None, None, None)
    assert metrics.history[0].train_accuracy is None
    trained = load_trained_model(folder / "model.safetensors")
    train_targets = torch.tensor(find_splits(images / "table.csv", values=("grey", "count"))["train"].targets)
    assert trained.objective == Regression().scaled_to(train_targets)
    assert json.loads((folder / "metrics.json").read_text())["objective"]["mean"] == list(trained.objective.mean)
    path = images / "70.png"
    expected = dict(
        zip(("grey", "count"), trained.objective.predict(outputs_of(trained, [path]))[0].tolist(), strict=True)
    )
    (prediction,) = predict(trained, [path])
    assert dict(prediction.values) == pytest.approx(expected, rel=1e-4)
    assert prediction.classes == ()
    given = ["predict", str(folder / "model.safetensors"), str(path), "--device", "cpu"]
    assert main(given) == 0
    assert capsys.readouterr().out == f"{path}: " + ", ".join(f"{n} {v:.6g}" for n, v in prediction.values) + "\n"
    assert main([*given, "--output", str(tmp_path / "values.csv")]) == 0
    with (tmp_path / "values.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert main([*given, "--output", str(tmp_path / "values.jsonl")]) == 0
    assert json.loads((tmp_path / "values.jsonl").read_text())["values"] == pytest.approx(expected, rel=1e-4)
    evaluation = evaluate_images(trained, images / "table.csv", show_progress=False)
    assert evaluation.metrics == pytest.approx(metrics.test_metrics, rel=1e-5)
    assert [score.name for score in evaluation.outputs] == ["grey", "count"]
    assert "Regression" not in evaluation.describe()
    head, first, *_ = evaluation.describe().splitlines()
    assert head.split() == ["mean", "absolute", "error", "R", "squared"]
    assert first.split() == ["grey", *evaluation.outputs[0].words().values()]


def test_a_run_and_an_evaluation_show_labels_and_values(
    images: Path, labelled: tuple[Path, Metrics], valued: tuple[Path, Metrics], tmp_path: Path
) -> None:
    for name, (folder, metrics), figures in (
        ("labels", labelled, ("images", "F1", "threshold", "average precision", "AUROC")),
        ("values", valued, ("mean absolute error", "R squared")),
    ):
        evaluation = evaluate_images(load_trained_model(folder / "model.safetensors"), images / "table.csv")
        written = write_evaluation(evaluation, tmp_path / name)
        assert [path.name for path in written] == ["evaluation.json", "predictions.csv", "report.html"]
        assert "answers" not in json.loads(written[0].read_text())
        head = "<tr><th></th>" + "".join(f"<th>{figure}</th>" for figure in figures) + "</tr>"
        first = evaluation.outputs[0]
        row = f"<tr><td>{first.name}</td>" + "".join(f"<td>{text}</td>" for text in first.words().values())
        pages = [(each / "report.html").read_text() for each in (folder, tmp_path / name)]
        for page in pages:
            assert head + row in page
            assert page.partition("<h2>Identical")[0].count("<figure>") == metrics.test_images == 16
            assert "commonest class" not in page
        assert "<td>images</td><td>48 to train, 16 to validate, 16 to test</td>" in pages[0]
        assert f"<td>{metrics.architecture}, {metrics.weights}</td>" in pages[0]
        assert [page.count("data:image/png;base64,") for page in pages] == [1, 0]  # the curves
    captions = [
        "<bdi>{}</bdi>, predicted <bdi>{}</bdi>".format(*evaluation.answers.words(index))
        for index in order_errors(evaluation.answers)
    ]
    places = [pages[1].index(caption) for caption in captions]
    assert places == sorted(places)
    assert order_errors(evaluation.answers)[0] == int(
        (abs(evaluation.answers.probabilities - evaluation.answers.targets) / numpy.std(evaluation.answers.targets, 0))
        .mean(1)
        .argmax()
    )


def test_a_run_and_an_evaluation_list_the_answers_to_labels_and_values(
    images: Path, labelled: tuple[Path, Metrics], valued: tuple[Path, Metrics], tmp_path: Path
) -> None:
    listed = {}
    for name, (folder, _) in (("labels", labelled), ("values", valued)):
        evaluation = evaluate_images(load_trained_model(folder / "model.safetensors"), images / "table.csv")
        write_evaluation(evaluation, tmp_path / name)
        files = [each / "predictions.csv" for each in (folder, tmp_path / name)]
        of_run, of_evaluation = (list(csv.DictReader(file.read_text().splitlines())) for file in files)
        assert [row["split"] for row in of_run] == ["validation"] * 16 + ["test"] * 16
        assert sorted(row["image"] for row in of_run) == [str(images / f"{index}.png") for index in range(48, 80)]
        assert [(row["image"], row["split"]) for row in of_evaluation] == [
            (row["image"], "test") for row in of_run[16:]
        ]
        assert [row.get("predicted") for row in of_evaluation] == [row.get("predicted") for row in of_run[16:]]
        listed[name] = of_run[16:]
    table = {row["path"]: row for row in csv.DictReader((images / "table.csv").read_text().splitlines())}
    for answer in listed["labels"]:
        row = table[Path(answer["image"]).name]
        assert answer["labels"] == row["labels"]
        assert answer["right"] == str(int(answer["predicted"] == row["labels"]))
        assert len(answer["probabilities"].split(";")) == len(answer["predicted"].split(";"))
    assert sum(row["right"] == "1" for row in listed["labels"]) / 16 == labelled[1].test_accuracy
    errors = []
    for answer in listed["values"]:
        assert list(answer)[2:5] == ["grey", "grey predicted", "grey error"]
        value, predicted, error = (float(cell) for cell in list(answer.values())[2:5])
        assert value == float(table[Path(answer["image"]).name]["grey"])
        assert error == pytest.approx(predicted - value)
        errors.append(abs(error))
    assert sum(errors) / 16 == pytest.approx(
        json.loads((tmp_path / "values" / "evaluation.json").read_text())["outputs"][0]["mean_absolute_error"], rel=1e-4
    )


def test_the_command_line_trains_values_of_columns(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "test_resnet", "--device", "cpu", "--mixed-precision", "no", "--epochs", "2", "--folds", "2"]
    given += ["--input-size", "32"]
    table, output = str(images / "table.csv"), str(tmp_path / "run")
    assert main(["train", table, "--regression", "grey, count", *given, "--output", output]) == 0
    printed = capsys.readouterr().out
    assert "values, train + validation + test: grey 1" in printed
    assert "mean absolute error" in printed
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["regression"] == ["grey", "count"]
    assert main(["train", "--run", str(tmp_path / "run" / "run.json"), "--output", str(tmp_path / "again")]) == 0
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("run", "again"))
    assert first["test_metrics"] == second["test_metrics"]
    assert main(["inspect", str(tmp_path / "run" / "model.safetensors")]) == 0
    assert "2 values (grey, count)" in capsys.readouterr().out
    # Further training keeps the scale of its classifier.
    rows = list(csv.DictReader((images / "table.csv").read_text().splitlines()))
    moved = [{**row, "path": str(images / row["path"]), "grey": float(row["grey"]) + 500} for row in rows]
    table = str(write_table(tmp_path / "moved.csv", moved))
    further = [
        "train",
        table,
        "--regression",
        "grey,count",
        "--checkpoint",
        str(tmp_path / "run" / "model.safetensors"),
    ]
    assert main([*further, "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "further")]) == 0
    objectives = (load_trained_model(tmp_path / name / "model.safetensors").objective for name in ("run", "further"))
    assert len(set(objectives)) == 1


def test_probabilities_in_a_table_are_learnt(images: Path, tmp_path: Path) -> None:
    rows = [{"path": images / f"{index}.png", "cat": 0.25, "dog": 0.75, "split": PARTS[index]} for index in range(80)]
    table = str(write_table(tmp_path / "table.csv", rows))
    command = ["train", table, "--soft-labels", "cat,dog", "--model", "test_resnet", "--monitor", "loss"]
    command += ["--lr", "0.01", "--epochs", "12", "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    lines = list(csv.DictReader((tmp_path / "run" / "predictions.csv").read_text().splitlines()))
    assert {(line["class"], line["predicted"], line["right"]) for line in lines} == {("dog", "dog", "1")}
    assert numpy.mean([float(line["probability"]) for line in lines]) == pytest.approx(0.75, abs=0.05)
    model = load_trained_model(tmp_path / "run" / "model.safetensors")
    (answer,) = predict(model, [images / "0.png"])
    assert [name for name, _ in answer.classes] == ["dog", "cat"]
    settings = TrainSettings(soft_labels=("cat", "dog"), monitor="accuracy")
    found = find_splits(Path(table), values=("cat", "dog"))
    assert isinstance(choose_objective(settings, found["train"], SingleLabel()), SoftLabels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"class_weights": "balanced"},
            "label_smoothing are for one class per image; these images have labels; leave",
        ),
        ({"label_smoothing": 0.1}, "these images have labels"),
        (
            {"monitor": "accuracy", "regression": ("grey",)},
            "these images have values, and their monitor is r2, loss or",
        ),
        ({"label_smoothing": 0.1, "soft_labels": ("grey", "count")}, "these images have probabilities"),
        ({"soft_labels": ("grey", "count")}, r"SoftLabels takes rows of numbers from 0 on that sum to 1"),
        ({"soft_labels": ("grey", "count"), "regression": ("grey",)}, "were both given"),
        ({"regression": ("path",)}, "path is '0.png'; expected a finite number"),
        ({"images": None, "regression": ("grey",)}, r"no table; values are read from columns of a table"),
    ],
)
def test_settings_of_other_targets_are_refused(
    settings: dict[str, Any], message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(images, tmp_path / "run", **settings)


def test_a_model_is_evaluated_on_its_own_kind_of_targets(
    images: Path, labelled: tuple[Path, Metrics], valued: tuple[Path, Metrics], tmp_path: Path
) -> None:
    labels, values = (load_trained_model(folder / "model.safetensors") for folder, _ in (labelled, valued))
    with pytest.raises(ValueError, match="the model has labels or values, and takes a table"):
        evaluate_images(labels, images)
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        evaluate_images(labels, tmp_path / "nothing")
    with pytest.raises(ValueError, match="--neighbors is for models of one class per image"):
        evaluate_images(labels, images / "table.csv", neighbors=images)
    with pytest.raises(ValueError, match="no column grey; its columns are path, labels"):
        evaluate_images(values, images / "whole.csv")
    classes: list[dict[str, object]] = [{"path": str(images / "0.png"), "label": "blue"}]
    with pytest.raises(
        ValueError, match="one class per image, and the model has labels; pass a table with a column lab"
    ):
        evaluate_images(labels, write_table(tmp_path / "classes.csv", classes))


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_unreadable_images_are_skipped(
    images: Path, cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in images.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.name not in {"3.png", "70.png"} else b"no image")
    (tmp_path / "table.csv").write_bytes((images / "table.csv").read_bytes())
    found = find_splits(tmp_path / "table.csv")["test"]
    loader = DeviceLoader(ImageDataset(found, lambda image: torch.zeros(3)), torch.device("cpu"), batch_size=16)
    (rows,) = (targets for _, targets in loader)
    assert [path.name for path, row in zip(found.paths, rows, strict=True) if row.isnan().any()] == ["70.png"]
    for name, regression in (("labels", None), ("values", ("grey",))):
        phases = (Phase(epochs=1, lr=0.01),)
        metrics = run(tmp_path, tmp_path / name, regression=regression, phases=phases, cache=cache)
        assert (metrics.train_images, metrics.test_images) == (47, 15)
        assert [message.split(":")[0].rsplit("/")[-1] for message in metrics.skipped_images] == ["3.png", "70.png"]
        evaluation = evaluate_images(load_trained_model(tmp_path / name / "model.safetensors"), tmp_path / "table.csv")
        assert (evaluation.images, len(evaluation.skipped_images)) == (15, 1)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"kind": "MultiLabel", "thresholds": [0.5]}, "thresholds has 1 entries for 2 outputs"),
        ({"kind": "MultiLabel", "thresholds": [0.5, 1.5]}, "less than or equal to 1"),
        ({"kind": "Regression", "mean": [0.0, 0.0], "std": [0.0, 1.0]}, "greater than 0"),
        ({"kind": "Regression", "mean": [float("nan")], "std": [1.0]}, "finite number"),
        ({"kind": "Regression", "mean": [0.0] * 3, "std": [1.0]}, "mean has 3 entries for 2 outputs"),
        ({"kind": "Ranking"}, "kind"),
        ({"kind": "MultiLabel", "code": "x"}, "extra inputs are not permitted"),
    ],
)
def test_a_file_with_an_invalid_objective_is_refused(objective: dict[str, Any], message: str, labelled: Any) -> None:
    trained = load_trained_model(labelled[0] / "model.safetensors")
    metadata = {"architecture": "test_resnet", "class_names": '["cat", "dog"]'}
    metadata |= {"data_config": json.dumps(dict(trained.data_config))}
    assert parse_metadata(metadata).make_objective() == SingleLabel()
    with pytest.raises(ValueError, match=message):
        parse_metadata({**metadata, "objective": json.dumps(objective)})
    with pytest.raises(ValueError, match="two names or more"):
        parse_metadata({**metadata, "class_names": '["cat"]'})
