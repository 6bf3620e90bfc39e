"""``report.html``: how a classifier does on labelled images, in one file to look at, without a script or a download."""

import base64
import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy
from PIL import Image
from torch import nn

from ..data.images import read_image
from ..files import replacing
from ..text import printable
from .evaluate import ClassScore, Evaluation, score_answers
from .figures import Answers, calibration_bins, order_mistakes
from .metrics import Metrics

SHOWN = 24  # images of each kind
SIDE = 160  # of a thumbnail, in pixels

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 70rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { min-width: 6rem; overflow-wrap: anywhere; text-align: left; }
.matrix td { text-align: center; min-width: 2rem; } .matrix th { font-weight: normal; }
.images { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
img { background: var(--soft); height: 8rem; object-fit: contain; width: 100%; }
svg { height: auto; max-width: 100%; } svg text { fill: currentColor; font-size: 11px; }
"""


def write_evaluation(evaluation: Evaluation, folder: Path, *, title: str = "Evaluation") -> tuple[Path, ...]:
    """Write an evaluation into a folder, which is created where there is none; see `make_report` for the page.

    ``evaluation.json`` has the figures, ``predictions.csv`` a line for each image with its class, the answer and the
    probability of that, ``confusion.png`` the confusion matrix, and ``report.html`` all of it to look at.

    Returns:
        The paths of the four files.
    """
    from .plots import draw_confusion  # noqa: PLC0415 (matplotlib, only where it is needed)

    folder.mkdir(parents=True, exist_ok=True)
    numbers, table, image, page = (
        folder / name for name in ("evaluation.json", "predictions.csv", "confusion.png", "report.html")
    )
    with replacing(numbers) as temporary:
        figures = {each.name: getattr(evaluation, each.name) for each in fields(evaluation) if each.name != "answers"}
        temporary.write_text(json.dumps(figures, indent=2, default=asdict) + "\n")
    answers = evaluation.answers
    with replacing(table) as temporary, temporary.open("w", -1, "utf-8", "surrogateescape", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "class", "predicted", "probability", "right"])
        for path, target, predicted, row in zip(
            answers.paths, answers.targets, answers.predicted, answers.probabilities, strict=True
        ):
            pair = (answers.class_names[target], answers.class_names[predicted])
            rows.writerow([path, *pair, row.max(), int(target == predicted)])
    # The bytes of a name that are not text cannot be drawn.
    names = [score.name.encode(errors="backslashreplace").decode() for score in evaluation.classes]
    with replacing(image) as temporary:
        draw_confusion(evaluation.confusion, names, temporary)
    with replacing(page) as temporary:
        temporary.write_text(make_report(evaluation, title=title, facts={}), encoding="utf-8")
    return numbers, table, image, page


def make_report(
    evaluation: Evaluation, *, title: str, facts: Mapping[str, str], curves: Mapping[str, Sequence[float]] | None = None
) -> str:
    """Write how a classifier does on labelled images as one HTML page.

    Names of files and classes are escaped, thumbnails are inside the page, and a policy in it forbids scripts and any
    access to the network.

    Args:
        evaluation: What the model answered, and its figures.
        title: What the page is of.
        facts: Lines of a table at its top, by name.
        curves: Figures by epoch to draw, 0 to 1, by name.

    Returns:
        The page.
    """
    answers = evaluation.answers
    confidence, is_right, mistakes = answers.probabilities.max(1), answers.is_right, order_mistakes(answers)
    least_sure = [int(index) for index in numpy.argsort(confidence, kind="stable") if is_right[index]]
    known = {
        **facts,
        "accuracy": f"{evaluation.accuracy_interval} of {evaluation.images:,} images",
        "balanced accuracy": f"{evaluation.balanced_accuracy:.3f} (the mean recall of the classes)",
        "calibration error": f"{evaluation.calibration_error} (the mean distance of confidence and accuracy)",
    }
    if evaluation.skipped_images:
        known["skipped"] = f"{len(evaluation.skipped_images):,} images that cannot be read"
    bins = calibration_bins(confidence, is_right)
    parts = [
        f"<h1>{_text(title)}</h1>",
        _table(("", ""), known.items(), head=False),
        *(["<h2>By epoch</h2>", _curves(curves)] if curves else []),
        "<h2>By class</h2>",
        _class_table(evaluation.classes),
        "<h2>Which class was taken for which</h2>",
        _confusion(answers.class_names, evaluation.confusion),
        "<h2>Confidence and accuracy</h2>",
        _table(
            ("confidence", "accuracy", "images"),
            ((f"{sure:.2f}", f"{right:.2f}", count) for count, sure, right in bins),
        ),
        f"<h2>The most confident mistakes ({len(mistakes)} in all); a label may be wrong</h2>",
        _gallery(answers, mistakes[:SHOWN]),
        "<h2>Right, and least sure</h2>",
        _gallery(answers, least_sure[:SHOWN]),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def report_run(metrics: Metrics, answers: Answers, model: nn.Module) -> str:
    """Write the page of a training run: what trained on what, and how it does on the test images.

    Without test images, it is how it does on the validation images, and the page says so.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    kept = metrics.best_epoch or len(metrics.history)
    why = ", the best on the validation images" if metrics.best_epoch is not None else ""
    facts = {
        "model": f"{metrics.architecture}, {metrics.weights}",
        "trained": f"{trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters",
        "images": f"{metrics.train_images:,} to train, {metrics.validation_images:,} to validate, "
        f"{metrics.test_images:,} to test",
        "epoch": f"{kept} of {len(metrics.history)}{why}",
        "rates": f"lr {metrics.history[kept - 1].lr:g}, weight decay {metrics.history[kept - 1].weight_decay:g}",
        "always the commonest class": f"{metrics.chance or 0:.3f}",
    }
    if (times := metrics.backward_milliseconds) is not None:
        facts["backward pass"] = f"{times.frozen:.2f} ms frozen, {times.unfrozen:.2f} ms unfrozen"
    curves = {"training": [epoch.train_accuracy or 0.0 for epoch in metrics.history]}
    if metrics.validation_accuracy is not None:
        curves["validation"] = [epoch.validation_accuracy or 0.0 for epoch in metrics.history]
    evaluation = score_answers(answers)
    images = "Test"
    if not metrics.test_images:
        images, facts["test images"] = "Validation", "none: the figures are of the validation images"
    return make_report(evaluation, title=f"{images} images of a fine-tuned model", facts=facts, curves=curves)


def _class_table(scores: Iterable[ClassScore]) -> str:
    rows = [
        (score.name, score.support, *("-" if share is None else f"{share:.3f}" for share in shares))
        for score in scores
        for shares in [(score.precision, score.recall, score.f1, score.auroc)]
    ]
    return _table(("class", "images", "precision", "recall", "F1", "AUROC"), rows)


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Draw the confusion matrix: a row for each true class, a column for each predicted one."""
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    rows = [f'<tr><th>true</th><th colspan="{len(names)}">predicted</th></tr><tr><th></th>{head}</tr>']
    for name, row in zip(names, counts, strict=True):
        shades = [count / max(sum(row), 1) for count in row]
        cells = "".join(
            f'<td style="background: rgb(74 126 187 / {shade:.2f})">{count or ""}</td>'
            for count, shade in zip(row, shades, strict=True)
        )
        rows.append(f"<tr><th>{_text(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="matrix">{"".join(rows)}</table></div>'


def _curves(curves: Mapping[str, Sequence[float]]) -> str:
    """Draw figures by epoch, 0 to 1, as an SVG.

    >>> _curves({"training": [0.5, 1.0]}).count("<polyline")
    1
    """
    width, height, margin = 640, 240, 30
    lines = []
    for place, (name, values) in enumerate(curves.items()):
        step = (width - 2 * margin) / max(len(values) - 1, 1)
        points = " ".join(
            f"{margin + index * step:.1f},{height - margin - value * (height - 2 * margin):.1f}"
            for index, value in enumerate(values)
        )
        colour = ("#4a7ebb", "#c0504d", "#7f9a48", "#8064a2")[place % 4]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{margin + 100 * place}" y="14" style="fill: {colour}">{_text(name)}</text>')
    for share in (0, 0.5, 1):
        y = height - margin - share * (height - 2 * margin)
        lines.append(f'<line x1="{margin}" x2="{width - margin}" y1="{y}" y2="{y}" stroke="#8884"/>')
        lines.append(f'<text x="0" y="{y + 4}">{share:g}</text>')
    count = max(map(len, curves.values()))
    lines.append(f'<text x="{width - margin - 60}" y="{height - 8}">epoch {count}</text>')
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(lines)}</svg>'


def _gallery(answers: Answers, indices: Iterable[int]) -> str:
    """Show images with their class, the answer, and its probability."""
    figures = []
    for index in indices:
        answer = int(answers.probabilities[index].argmax())
        path, names = answers.paths[index], answers.class_names
        share = answers.probabilities[index, answer]
        caption = f"{names[answers.targets[index]]}, predicted {names[answer]} {share:.0%}"
        figures.append(
            f'<figure><img alt="{_text(path.name)}" src="{_thumbnail(path)}">'
            f"<figcaption>{_text(caption)}<br>{_text(path.name)}</figcaption></figure>"
        )
    return f'<div class="images">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def _thumbnail(path: Path) -> str:
    """Return a small JPEG of an image as a data URL; of one that is gone or broken by now an empty one."""
    try:
        image = read_image(path)
    except (OSError, ValueError):
        return "data:,"
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _table(head_cells: Sequence[object], rows: Iterable[Sequence[object]], *, head: bool = True) -> str:
    lines = [f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head_cells)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _text(value: object) -> str:
    """Escape a text; bytes of a file's name that are no text are written as escapes."""
    return html.escape(printable(str(value)).encode(errors="backslashreplace").decode())
