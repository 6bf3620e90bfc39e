"""The page of an evaluation: right figures, escaped names, nothing from elsewhere, and a browser that shows it."""

import csv
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from image_folders import make_folder, make_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from backbone_finetune import FineTuneModel
from backbone_finetune.cli import main
from backbone_finetune.recipes.commands.reporting.evaluation_files import write_evaluation
from backbone_finetune.recipes.commands.reporting.figures import (
    Answers,
    Array,
    bootstrap,
    calibration_interval,
    chance_calibration_error,
    expected_calibration_error,
)
from backbone_finetune.recipes.commands.reporting.label_issues import LabelIssue
from backbone_finetune.recipes.commands.reporting.plots import draw_confusion, draw_curves
from backbone_finetune.recipes.commands.reporting.report import make_report, report_run
from backbone_finetune.recipes.commands.reporting.scores import score_classes
from backbone_finetune.recipes.commands.runs.metrics import Metrics
from backbone_finetune.recipes.commands.settings import TrainSettings
from backbone_finetune.recipes.data.sources.identical import Copy
from backbone_finetune.recipes.training.progress import EpochResult

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '<script>document.title="ran"</script>"&\x1b[31m'


def make_answers(folder: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 40) -> Answers:
    generator = numpy.random.default_rng(0)
    probabilities = generator.dirichlet(numpy.ones(len(names)), size=count)
    paths = []
    for index in range(count):
        make_image(folder / f"{index}.png", (index, 0, 0))
        paths.append(folder / f"{index}.png")
    return Answers(names, paths, [index % len(names) for index in range(count)], probabilities)


class Page(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in {"src", "href"}]


def report_images(
    answers: Answers,
    architecture: str = "test_resnet",
    copies: tuple[Copy, ...] = (),
    issues: Sequence[LabelIssue] = (),
) -> str:
    """Return the page of a run of no epoch."""
    model = FineTuneModel.from_timm("test_resnet", num_classes=len(answers.class_names))
    metrics = Metrics(
        test_accuracy=None,
        chance=None,
        copies=copies,
        architecture=architecture,
        weights=architecture,
        phases=(),
        batch_size=8,
        seed=0,
        processes=1,
        data_config={},
        class_names=tuple(answers.class_names),
        train_images=0,
        validation_images=0,
        test_images=len(answers.paths),
        skipped_images=(),
        history=(),
        device="cpu",
        versions={},
    )
    return report_run(metrics, answers, model, TrainSettings(), issues=issues)


def test_an_evaluation_is_written_as_figures_a_table_and_a_page(tmp_path: Path) -> None:
    answers = make_answers(tmp_path / "images")
    evaluation = score_classes(answers)
    paths = write_evaluation(evaluation, tmp_path / "out", title="a model")
    assert [path.name for path in paths] == ["evaluation.json", "predictions.csv", "confusion.png", "report.html"]
    figures = json.loads(paths[0].read_text())
    assert figures["accuracy_interval"]["value"] == figures["accuracy"] == answers.is_right.mean()
    assert figures["accuracy_interval"]["low"] < figures["accuracy"] < figures["accuracy_interval"]["high"]
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(rows) == 40
    assert sum(row["right"] == "1" for row in rows) / 40 == figures["accuracy"]
    assert all((row["class"] == row["predicted"]) == (row["right"] == "1") for row in rows)
    page = paths[3].read_text()
    by_chance = evaluation.calibration_error_by_chance
    assert (
        f"the mean distance of confidence and accuracy; on 40 images, up to {by_chance:.3f} can be chance</td>" in page
    )
    for score in evaluation.classes:
        assert f"<td>{score.name}</td><td>{score.support}</td><td>{score.precision:.3f}</td>" in page
    assert page.count("<figure>") == min(24, int((answers.is_right == 0).sum())) + min(24, int(answers.is_right.sum()))


def test_a_page_has_its_figures_in_the_right_order(tmp_path: Path) -> None:
    confusion = ((4, 3, 0), (1, 5, 2), (0, 0, 6))  # a row for each true class
    targets, predicted = (
        [pair[place] for pair in numpy.ndindex(3, 3) for _ in range(confusion[pair[0]][pair[1]])] for place in (0, 1)
    )
    sure = 0.501 + 0.02 * numpy.random.default_rng(0).permutation(len(targets))  # 0.501 to 0.901
    probabilities = numpy.where(numpy.eye(3)[predicted] == 1, sure[:, None], (1 - sure[:, None]) / 2)
    answers = Answers(("cat", "dog", "owl"), [tmp_path / "gone.png"] * len(targets), targets, probabilities)
    page = make_report(score_classes(answers), title="a model", facts={})
    matrix = page[page.index('<table class="matrix">') :].partition("</table>")[0].split("<tr>")[3:]
    assert [re.findall(">([0-9]*)</td>", row) for row in matrix] == [
        [str(count or "") for count in row] for row in confusion
    ]
    mistakes, right = (
        [int(share) for share in re.findall("([0-9]+)%<br>", part)]
        for part in page[page.index("<h2>The most confident mistakes") :].split("<h2>Right, and least sure")
    )
    assert (len(mistakes), len(right)) == (6, 15)
    assert mistakes == sorted(mistakes, reverse=True)
    assert right == sorted(right)
    inside = (sure >= 0.6) & (sure < 0.7)
    cells = (f"{sure[inside].mean():.2f}", f"{answers.is_right[inside].mean():.2f}", inside.sum())
    assert "<tr><th>confidence</th><th>accuracy</th><th>images</th></tr>" in page
    assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in page


def test_a_page_takes_nothing_from_elsewhere_and_escapes_names(tmp_path: Path) -> None:
    answers = make_answers(tmp_path / "images", (HOSTILE, "dog\udcff"))
    hostile = tmp_path / "images" / "<img src=x onerror=alert(1)>.png"
    make_image(hostile, (1, 2, 3))
    answers = replace(answers, paths=[hostile, *answers.paths[1:-1], tmp_path / "gone.png"])
    copies = (Copy(hostile, "test", HOSTILE, hostile, "train", HOSTILE),)
    issues = [LabelIssue(hostile, HOSTILE, HOSTILE, 0.1)]
    for text in (
        make_report(score_classes(answers), title=HOSTILE, facts={HOSTILE: HOSTILE}, curves=answers.paths[0]),
        report_images(answers, architecture=HOSTILE, copies=copies, issues=issues),
    ):
        page = Page(text)
        assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
        assert page.addresses
        assert all(address.startswith("data:") for address in page.addresses)
        assert "\x1b" not in text
        text.encode()
        assert "default-src 'none'" in text
    assert text.count("<figure>") == 40 + 1 + 2  # answers, issues, and pairs of copies


def test_a_run_without_identical_images_says_so(tmp_path: Path) -> None:
    page = report_images(make_answers(tmp_path))
    assert "<h2>Identical images in two parts or two classes</h2>\n<p>None, byte for byte.</p>" in page


def test_the_references_of_a_plot_look_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("test", "chance", "random backbone", "raw pixels", "neighbours")
    drawn: list[Figure] = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, _: drawn.append(canvas.figure))
    draw_curves([EpochResult(1, 1.0, 0.5, 1e-3, 0.01)], dict.fromkeys(names, 0.5), tmp_path / "curves.png")
    lines = [line for line in drawn[0].axes[1].lines if line.get_label() in names]
    assert [line.get_label() for line in lines] == list(names)
    assert len({(line.get_linestyle(), line.get_color()) for line in lines}) == len(names)


MEASURE = """
onload = () => document.body.append("measured " + JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.scrollingElement;
  const right = (element) => element.getBoundingClientRect().right;
  return {
    figures: page.querySelectorAll("figure").length,
    overflow: root.scrollWidth - view.innerWidth,
    predicted: right(page.querySelector(".axis span")) < right(page.querySelector(".matrix").parentElement),
    names: [...page.querySelectorAll(".matrix bdi")].every(bdi => bdi.offsetHeight <= 130 && bdi.offsetWidth <= 130),
    background: view.getComputedStyle(page.body).backgroundColor,
    curves: page.querySelector("img.whole").offsetWidth,
  };
})));
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desktop_in_the_light_and_in_the_dark(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    names = (HOSTILE, "x" * 250, "\u202eright to left", "כלב", *"abcdefghijklmnop")
    answers = make_answers(tmp_path / "images", names)
    draw_curves([EpochResult(1, 1.0, 0.5, 1e-3, 0.01)], {}, tmp_path / "curves.png")
    page = make_report(score_classes(answers), title="a model", facts={}, curves=tmp_path / "curves.png")
    frames = [f'<iframe width="{width}" srcdoc="{html.escape(page)}"></iframe>' for width in (390, 1200)]
    (tmp_path / "frames.html").write_text(f"<meta charset=utf-8>{''.join(frames)}<script>{MEASURE}</script>")
    backgrounds = []
    for scheme in (0, 1):  # dark, light
        browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        shown = subprocess.run(
            [
                *browser,
                f"--blink-settings=preferredColorScheme={scheme}",
                "--dump-dom",
                (tmp_path / "frames.html").as_uri(),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        phone, desktop = json.loads(
            html.unescape(shown[shown.rindex("measured [") :].partition(" ")[2].partition("</")[0])
        )
        for measured in (phone, desktop):
            assert measured["figures"] == page.count("<figure>")
            assert measured["overflow"] <= 0
            assert measured["predicted"]
            assert measured["names"]
        assert phone["curves"] > 300
        backgrounds.append(phone["background"])
    assert backgrounds[0] != backgrounds[1]


def test_names_written_right_to_left_do_not_reorder_captions(tmp_path: Path) -> None:
    answers = make_answers(tmp_path / "images", ("\u202egod", "כלב"), count=4)
    page = make_report(score_classes(answers), title="names", facts={})
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == 4
    names = "(<bdi>\u202egod</bdi>|<bdi>כלב</bdi>)"
    assert all(re.fullmatch(f"{names}, predicted {names} [0-9]+%<br><bdi>[0-9].png</bdi>", each) for each in captions)


def test_a_run_and_an_evaluation_leave_the_same_page_of_the_test_images(tmp_path: Path) -> None:
    for name in ("train", "test"):
        make_folder(tmp_path / "data" / name)
    (tmp_path / "data" / "test" / "red" / "0.png").write_bytes(b"no image")
    small = ["--model", "test_resnet", "--epochs", "2", "--lr", "0.05", "--batch-size", "4"]
    assert main(["train", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    model = str(tmp_path / "run" / "model.safetensors")
    assert main(["evaluate", model, str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    pages = [(folder / "report.html").read_text() for folder in (tmp_path / "run", tmp_path / "out")]
    tables = [re.search("<h2>By class</h2>(.*?)<h2>The most", page, re.DOTALL) for page in pages]
    assert tables[0] is not None
    assert tables[1] is not None
    assert tables[0].group(1) == tables[1].group(1)
    assert "of 17 images" in pages[0]


def test_a_run_lists_its_held_out_images_as_an_evaluation_does(tmp_path: Path) -> None:
    for index, name in enumerate(("train", "val", "test")):
        make_folder(tmp_path / "data" / name, per_class=4 + index)
    (tmp_path / "data" / "val" / "red" / "0.png").write_bytes(b"no image")
    hostile = tmp_path / "data" / "test" / "blue" / "=1+1,\"\n'.png"
    hostile.with_name("0.png").rename(hostile)
    small = ["--model", "test_resnet", "--input-size", "32", "--epochs", "1", "--lr", "0.05", "--mixed-precision", "no"]
    assert main(["train", str(tmp_path / "data"), *small, "--output", str(tmp_path / "run")]) == 0
    model = str(tmp_path / "run" / "model.safetensors")
    assert main(["evaluate", model, str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    listed = []
    for folder in (tmp_path / "run", tmp_path / "out"):
        with (folder / "predictions.csv").open(newline="") as file:
            listed.append(list(csv.DictReader(file)))
    validation, test = ([row for row in listed[0] if row["split"] == split] for split in ("validation", "test"))
    assert listed[0] == [*validation, *test]
    assert (len(validation), len(test)) == (14, 18)
    assert Path(test[5]["image"]) == hostile  # after the digits
    for row, other in zip(test, listed[1], strict=True):
        assert float(row.pop("probability")) == pytest.approx(float(other.pop("probability")), rel=1e-4)
        assert row == other
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for rows, part in ((validation, "validation"), (test, "test")):
        assert sum(row["right"] == "1" for row in rows) / len(rows) == pytest.approx(metrics[f"{part}_accuracy"])
    assert {row["class"] for row in validation} == {Path(row["image"]).parent.name for row in validation}


def test_the_page_of_a_run_names_the_epoch_that_was_kept_and_its_rates(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        make_folder(tmp_path / "data" / name)
    phases = "[[phases]]\nepochs = 1\nlr = 0.001\n[[phases]]\nepochs = 2\nlr = 1e-30\n"  # the second changes nothing
    (tmp_path / "phases.toml").write_text(phases)
    options = ["--model", "test_resnet", "--phases", str(tmp_path / "phases.toml"), "--monitor", "loss"]
    assert main(["train", str(tmp_path / "data"), *options, "--output", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td>1 of 3, the best on the validation images</td>" in page
    assert f"<td>{tmp_path / 'data'}</td>" in page
    for row in (
        ("1", "1", "classifier", "0.001", "-", "0.01", "unchanged"),
        ("2", "2", "classifier", "1e-30", "-", "0.01", "unchanged"),
    ):
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page


def test_the_page_of_a_run_says_what_freezing_saved(tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_folder(tmp_path / "data" / name)
    phases = [
        "epochs = 3\nlr = 0.001",
        "epochs = 2\ntrainable_groups = 1\nbackbone_lr = 0.002",
        "epochs = 1\ntrainable_groups = 1\naugment = 'light'",
        "epochs = 1\ntrainable_groups = 1\nmixup = 0.2",
        "epochs = 1\ntrainable_groups = 5",
    ]
    (tmp_path / "phases.toml").write_text("\n".join(f"[[phases]]\n{phase}" for phase in phases))
    options = ["--model", "test_resnet", "--phases", str(tmp_path / "phases.toml"), "--monitor", "accuracy"]
    assert main(["train", str(tmp_path / "data"), *options, "--output", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    model = FineTuneModel.from_timm("test_resnet", num_classes=3)
    sizes = [sum(each.numel() for each in part.parameters()) for part in (model, model.classifier)]
    whole, last = sizes[0], sizes[1]
    names = set(model.layer_groups[-1].parameter_names)
    with_group = last + sum(each.numel() for name, each in model.backbone.named_parameters() if name in names)
    images = len(list((tmp_path / "data").rglob("*.png")))
    counts = (last, with_group, with_group, with_group, whole)
    computed = (
        f"once for each image: {images}, not {3 * images}",
        f"once for each image: {images}, not {2 * images}",
        f"in each epoch: {images} images; the phase draws new images in each epoch; --views K (in Python: "
        "TrainerConfig(views=K)) caches K of each, and --augment none the images themselves",
        f"in each epoch: {images} images; mixup and CutMix mix the images of each step",
        "none is frozen",
    )
    for number, (count, how) in enumerate(zip(counts, computed, strict=True), start=1):
        saved = f"{(whole - count) * 12 / 1e6:,.1f} MB"
        row = (str(number), f"{count:,} of {whole:,}", saved, how)
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" in page
    group = model.layer_groups[-1].name
    for cells in (
        f"<td>{group}, classifier</td><td>0.001</td><td>0.002</td>",
        "<td>augment light</td>",
        "<td>mixup 0.2</td>",
    ):
        assert cells in page
    assert f"<td>all layers: {model.layer_groups[0].name} to {group}, classifier</td>" in page


def test_without_test_images_the_page_is_of_the_validation_images(tmp_path: Path) -> None:
    for name in ("train", "val"):
        make_folder(tmp_path / "data" / name)
    options = ["--model", "test_resnet", "--epochs", "2", "--lr", "0.05", "--monitor", "accuracy"]
    assert main(["train", str(tmp_path / "data"), *options, "--output", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<title>test_resnet on data: validation images</title>" in page
    assert "of 18 images" in page
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test_accuracy"] is None


def test_of_many_classes_the_most_confused_pairs_are_listed(tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(100))
    targets = [index % 100 for index in range(300)]
    predicted = [7 if target == 3 else 9 if index == 11 else target for index, target in enumerate(targets)]
    probabilities = 0.9 * numpy.eye(100)[predicted] + 0.001
    answers = Answers(names, [tmp_path / "gone.png"] * 300, targets, probabilities)
    page = make_report(score_classes(answers), title="many", facts={})
    assert "<p>The 2 most confused of 2 pairs.</p>" in page
    first, second = (
        f"<tr><td>class {true}</td><td>class {wrong}</td><td>{count}</td><td>{share}</td></tr>"
        for true, wrong, count, share in ((3, 7, 3, "100%"), (11, 9, 1, "33%"))
    )
    assert 0 < page.index(first) < page.index(second)
    assert len(page) < 50_000
    few = make_report(score_classes(make_answers(tmp_path)), title="few", facts={})
    assert '<table class="matrix">' in few
    assert "most confused of" not in few


def test_figures_are_those_of_their_definitions() -> None:
    generator = numpy.random.default_rng(0)
    confidence, right = generator.random(1000), generator.random(1000)
    perfect = (right < confidence).astype(float)
    assert expected_calibration_error(confidence, perfect) < 0.06
    assert expected_calibration_error(confidence, 1 - perfect) > 0.3
    by_chance = [chance_calibration_error(confidence[:count]) for count in (30, 1000)]
    assert by_chance[0] > 0.15
    assert 0.06 > by_chance[1] > expected_calibration_error(confidence, perfect)
    wide, narrow = (bootstrap(lambda values: float(values.mean()), right[:count]) for count in (30, 1000))
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


@pytest.mark.parametrize(("gap", "count"), [(0.0, 50), (0.2, 200)])
def test_the_interval_of_the_calibration_error_contains_that_of_all_images(gap: float, count: int) -> None:
    """The error of a sample is larger, and those of draws from it are larger again: their percentiles lie too high."""
    generator = numpy.random.default_rng(0)

    def draw(count: int) -> tuple[Array, Array]:
        confidence = generator.beta(4, 1.5, count)
        return confidence, (generator.random(count) < confidence - gap).astype(float)

    truth = expected_calibration_error(*draw(10**6))
    inside = 0
    for _ in range(20):
        confidence, right = draw(count)
        interval = calibration_interval(confidence, right, chance_calibration_error(confidence))
        assert 0 <= interval.low <= interval.value <= interval.high
        inside += interval.low <= truth + 0.001 and truth - 0.001 <= interval.high
    assert inside >= 17


def test_a_confusion_matrix_of_names_that_the_font_lacks_is_drawn_without_a_warning(tmp_path: Path) -> None:
    draw_confusion([[1, 0], [0, 1]], ["\u732b", "\u72ac"], tmp_path / "confusion.png")  # Chinese: cat, dog
    assert (tmp_path / "confusion.png").stat().st_size > 0
