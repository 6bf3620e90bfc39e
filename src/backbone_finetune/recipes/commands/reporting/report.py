"""``report.html``: how a classifier does on labelled images, in one file to look at, without a script or a download."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy
from torch import nn

from ...data.sources.identical import Copy
from ...files import csv_writer, replacing
from ..evaluate import ClassScore, Evaluation, describe_calibration, score_answers
from ..runs.metrics import Metrics
from .figures import Answers, calibration_bins, order_mistakes
from .label_issues import LabelIssue
from .page import curves_svg, gallery, make_page, table, text

SHOWN = 24  # images of each kind
MOST_DRAWN = 30  # classes; of more, the matrix is larger than a screen, and than all else in the page
MOST_PAIRS = 50


def write_evaluation(evaluation: Evaluation, folder: Path, *, title: str = "Evaluation") -> tuple[Path, ...]:
    """Write an evaluation into a folder, which is created where there is none; see `make_report` for the page.

    ``evaluation.json`` has the figures, ``predictions.csv`` a line for each image with its class, the answer and the
    probability of that, ``confusion.png`` the confusion matrix, and ``report.html`` all of it to look at.

    Returns:
        The paths of the four files.
    """
    from .plots import draw_confusion  # noqa: PLC0415 (matplotlib, only where it is needed)

    folder.mkdir(parents=True, exist_ok=True)
    numbers, predictions, image, page = (
        folder / name for name in ("evaluation.json", "predictions.csv", "confusion.png", "report.html")
    )
    with replacing(numbers) as temporary:
        figures = {each.name: getattr(evaluation, each.name) for each in fields(evaluation) if each.name != "answers"}
        temporary.write_text(json.dumps(figures, indent=2, default=asdict) + "\n")
    answers = evaluation.answers
    with replacing(predictions) as temporary, csv_writer(temporary) as rows:
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
    return numbers, predictions, image, page


def make_report(
    evaluation: Evaluation,
    *,
    title: str,
    facts: Mapping[str, str],
    curves: Mapping[str, Sequence[float]] | None = None,
    more: Iterable[str] = (),
) -> str:
    """Write how a classifier does on labelled images as one HTML page.

    Names of files and classes are escaped, thumbnails are inside the page, and a policy in it forbids scripts and any
    access to the network.

    Args:
        evaluation: What the model answered, and its figures.
        title: What the page is of.
        facts: Lines of a table at its top, by name.
        curves: Figures by epoch to draw, 0 to 1, by name.
        more: Further parts of the page, in HTML.

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
        "calibration error": describe_calibration(evaluation),
    }
    if evaluation.neighbor_accuracy is not None:
        known["neighbours"] = f"{evaluation.neighbor_accuracy} (a vote of the 20 nearest training images)"
    if evaluation.skipped_images:
        known["skipped"] = f"{len(evaluation.skipped_images):,} images that cannot be read"
    bins = calibration_bins(confidence, is_right)
    parts = [
        f"<h1>{text(title)}</h1>",
        table(("", ""), known.items(), head=False),
        *(["<h2>By epoch</h2>", curves_svg(curves)] if curves else []),
        "<h2>By class</h2>",
        _class_table(evaluation.classes),
        "<h2>Which class was taken for which</h2>",
        (_confusion if len(answers.class_names) <= MOST_DRAWN else _confused)(
            answers.class_names, evaluation.confusion
        ),
        "<h2>Confidence and accuracy</h2>",
        table(
            ("confidence", "accuracy", "images"),
            ((f"{sure:.2f}", f"{right:.2f}", count) for count, sure, right in bins),
        ),
        f"<h2>The most confident mistakes ({len(mistakes)} in all); a label may be wrong</h2>",
        _show_answers(answers, mistakes[:SHOWN]),
        "<h2>Right, and least sure</h2>",
        _show_answers(answers, least_sure[:SHOWN]),
        *more,
    ]
    return make_page(title, parts)


def report_run(metrics: Metrics, answers: Answers, model: nn.Module, issues: Sequence[LabelIssue] | None = None) -> str:
    """Write the page of a training run: what trained on what, and how it does on the test images.

    Without test images, it is how it does on the validation images, and the page says so. It also shows images that are
    copies of others, and training images whose class looks wrong (``issues``), if that was checked.
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
    more = [] if issues is None else _show_issues(issues)
    if metrics.copies:
        more += _show_copies(metrics.copies)
    title = f"{images} images of a fine-tuned model"
    return make_report(evaluation, title=title, facts=facts, curves=curves, more=more)


def _class_table(scores: Iterable[ClassScore]) -> str:
    rows = [
        (score.name, score.support, *("-" if share is None else f"{share:.3f}" for share in shares))
        for score in scores
        for shares in [(score.precision, score.recall, score.f1, score.auroc)]
    ]
    return table(("class", "images", "precision", "recall", "F1", "AUROC"), rows)


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Draw the confusion matrix: a row for each true class, a column for each predicted one."""
    head = "".join(f"<th>{text(name)}</th>" for name in names)
    rows = [f'<tr><th>true</th><th colspan="{len(names)}">predicted</th></tr><tr><th></th>{head}</tr>']
    for name, row in zip(names, counts, strict=True):
        shades = [count / max(sum(row), 1) for count in row]
        cells = "".join(
            f'<td style="background: rgb(74 126 187 / {shade:.2f})">{count or ""}</td>'
            for count, shade in zip(row, shades, strict=True)
        )
        rows.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="matrix">{"".join(rows)}</table></div>'


def _confused(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """List the most confused pairs of many classes."""
    pairs = [
        (row[predicted], true, predicted)
        for true, row in enumerate(counts)
        for predicted in range(len(names))
        if row[predicted] and predicted != true
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    rows = [
        (names[true], names[predicted], count, f"{count / sum(counts[true]):.0%}")
        for count, true, predicted in pairs[:MOST_PAIRS]
    ]
    shown = f"<p>The {len(rows)} most confused of {len(pairs)} pairs.</p>"
    return shown + table(("true", "predicted", "images", "share of the class"), rows)


def _show_issues(issues: Sequence[LabelIssue]) -> list[str]:
    """Show the images whose class looks most wrong."""
    images = [
        (issue.path, f"{issue.given} {issue.score:.0%}, looks like {issue.suggested}") for issue in issues[:SHOWN]
    ]
    return [
        f"<h2>Training images whose class looks wrong ({len(issues)} in all)</h2>",
        "<p>Found by cleanlab, with models that did not train on these images. label_issues.csv lists all.</p>",
        gallery(images),
    ]


def _show_copies(copies: Sequence[Copy]) -> list[str]:
    """Show images that equal another one, beside that."""
    pairs = [
        ((copy.path, f"{copy.part} {copy.label}"), (copy.of_path, f"{copy.of_part} {copy.of_label}"))
        for copy in copies[:SHOWN]
    ]
    return [
        f"<h2>Identical images in two parts or two classes ({len(copies)} in all)</h2>",
        "<p>Of two parts, they make the accuracy too high; of two classes, one is wrong. metrics.json lists all.</p>",
        f'<div class="pairs">{"".join(map(gallery, pairs))}</div>',
    ]


def _show_answers(answers: Answers, indices: Sequence[int]) -> str:
    """Show images with their class, the answer, and its probability."""
    names, predicted = answers.class_names, answers.predicted
    captions = (
        f"{names[answers.targets[index]]}, predicted {names[predicted[index]]} {answers.probabilities[index].max():.0%}"
        for index in indices
    )
    return gallery(zip((answers.paths[index] for index in indices), captions, strict=True))
