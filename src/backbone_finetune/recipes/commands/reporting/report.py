"""``report.html``: how a model does on labelled images, in one file to look at, without a script or a download."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy

from backbone_finetune import FineTuneModel

from ...data.sources.identical import Copy
from ..runs.metrics import Metrics
from ..settings import TrainSettings
from .figures import Answers, calibration_bins, order_errors, order_mistakes
from .label_issues import LabelIssue
from .page import facts_table, gallery, make_page, picture, show_name, table, text
from .phases import show_phases
from .scores import ClassScore, Evaluation, LabelScore, TableEvaluation, ValueScore, score_answers

SHOWN = 24  # images of each kind
MOST_DRAWN = 30  # classes; of more, the matrix is larger than a screen, and than all else in the page
MOST_PAIRS = 50
LISTED = "<p>predictions.csv lists all images.</p>"


def make_report(
    evaluation: Evaluation | TableEvaluation,
    *,
    title: str,
    facts: Mapping[str, str],
    curves: Path | None = None,
    training: Iterable[str] = (),
    more: Iterable[str] = (),
) -> str:
    """Write how a model does on labelled images as one HTML page.

    Names of files and classes are escaped, thumbnails are inside the page, and a policy in it forbids scripts and any
    access to the network.

    Args:
        evaluation: What the model answered, and its figures.
        title: What the page is of.
        facts: Lines of a table at its top, by name.
        curves: A PNG file of figures by epoch.
        training: Parts of the page before the curves, in HTML.
        more: Parts after all others.

    Returns:
        The page.
    """
    head = [f"<h1>{text(title)}</h1>", facts_table({**facts, **evaluation.figures()}), *training]
    if curves is not None:
        head += ["<h2>By epoch</h2>", picture(curves.read_bytes())]
    parts = _show_classes(evaluation) if isinstance(evaluation, Evaluation) else _show_rows(evaluation)
    return make_page(title, [*head, *parts, *more])


def _show_classes(evaluation: Evaluation) -> list[str]:
    answers = evaluation.answers
    confidence, is_right, mistakes = answers.probabilities.max(1), answers.is_right, order_mistakes(answers)
    least_sure = [int(index) for index in numpy.argsort(confidence, kind="stable") if is_right[index]]
    bins = calibration_bins(confidence, is_right)
    return [
        "<h2>By class</h2>",
        _show_scores("class", evaluation.classes),
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
        LISTED,
        _show_answers(answers, mistakes[:SHOWN]),
        "<h2>Right, and least sure</h2>",
        _show_answers(answers, least_sure[:SHOWN]),
    ]


def _show_rows(evaluation: TableEvaluation) -> list[str]:
    """Show the figures of each label or value, and the images with the largest errors."""
    answers = evaluation.answers
    errors = order_errors(answers)[:SHOWN]
    return [
        "<h2>By label or value</h2>",
        _show_scores("", evaluation.outputs),
        "<h2>The largest errors; a label or value may be wrong</h2>",
        LISTED,
        gallery((answers.paths[index], _given_and_predicted(answers, index)) for index in errors),
    ]


def _show_scores(first: str, scores: Sequence[ClassScore | LabelScore | ValueScore]) -> str:
    return table((first, *scores[0].words()), ((score.name, *score.words().values()) for score in scores))


def report_run(
    metrics: Metrics,
    answers: Answers,
    model: FineTuneModel,
    settings: TrainSettings,
    *,
    issues: Sequence[LabelIssue] | None = None,
    curves: Path | None = None,
) -> str:
    """Write the page of a training run: what trained on what, and how it does on the test images.

    Without test images, it is how it does on the validation images, and the page says so. It also shows images that are
    copies of others, training images whose label looks wrong (``issues``), if that was checked, and the ``curves``.
    """
    kept = metrics.best_epoch or len(metrics.history)
    why = ", the best on the validation images" if metrics.best_epoch is not None else ""
    facts = {
        "model": f"{metrics.architecture}, {metrics.weights}",
        "data": "the packaged clipart" if settings.images is None else str(settings.images),
        "images": f"{metrics.train_images:,} to train, {metrics.validation_images:,} to validate, "
        f"{metrics.test_images:,} to test",
        "epoch": f"{kept} of {len(metrics.history)}{why}",
    }
    if metrics.chance is not None:
        facts["always the commonest class"] = f"{metrics.chance:.3f}"
    images = "test"
    if not metrics.test_images:
        images, facts["test images"] = "validation", "none: the figures are of the validation images"
    more = [*([] if issues is None else _show_issues(issues)), *_show_copies(metrics.copies)]
    data = "clipart" if settings.images is None else settings.images.resolve().name
    title = f"{metrics.architecture} on {data}: {images} images"
    training = show_phases(metrics, model, settings)
    evaluation = score_answers(answers)
    return make_report(evaluation, title=title, facts=facts, curves=curves, training=training, more=more)


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """Draw the confusion matrix: a row for each true class, a column for each predicted one."""
    head = "".join(f"<th>{show_name(each, 'down')}</th>" for each in names)
    rows = [
        f'<tr><th></th><th class="axis" colspan="{len(names)}"><span>predicted \u2192</span></th></tr>'
        f"<tr><th>true \u2193</th>{head}</tr>"
    ]
    for each, row in zip(names, counts, strict=True):
        shades = [count / max(sum(row), 1) for count in row]
        cells = "".join(
            f'<td style="background: rgb(74 126 187 / {shade:.2f})">{count or ""}</td>'
            for count, shade in zip(row, shades, strict=True)
        )
        rows.append(f"<tr><th>{show_name(each, 'across')}</th>{cells}</tr>")
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
        (issue.path, f"{show_name(issue.given)} {issue.score:.0%}, looks like {show_name(issue.suggested)}")
        for issue in issues[:SHOWN]
    ]
    return [
        f"<h2>Training images whose label may be wrong ({len(issues)} in all)</h2>",
        "<p>To look at, the most suspicious first: many of them are right, and only hard. The percentage is the "
        "probability of the given class, by models that did not train on the image (cleanlab). "
        "label_issues.csv lists all.</p>",
        gallery(images),
    ]


def _show_copies(copies: Sequence[Copy]) -> list[str]:
    """Show images that equal another one, beside that."""
    if not copies:
        return ["<h2>Identical images in two parts or two classes</h2>", "<p>None, byte for byte.</p>"]
    pairs = [
        (
            (copy.path, f"{copy.part} {show_name(copy.label)}"),
            (copy.of_path, f"{copy.of_part} {show_name(copy.of_label)}"),
        )
        for copy in copies[:SHOWN]
    ]
    return [
        f"<h2>Identical images in two parts or two classes ({len(copies)} in all)</h2>",
        "<p>Of two parts, they make the accuracy too high; of two classes, one is wrong. metrics.json lists all.</p>",
        f'<div class="pairs">{"".join(map(gallery, pairs))}</div>',
    ]


def _show_answers(answers: Answers, indices: Sequence[int]) -> str:
    """Show images with their class, the answer, and its probability."""
    sure = answers.probabilities.max(1)
    return gallery(
        (answers.paths[index], f"{_given_and_predicted(answers, index)} {sure[index]:.0%}") for index in indices
    )


def _given_and_predicted(answers: Answers, index: int) -> str:
    return "{}, predicted {}".format(*map(show_name, answers.words(index)))
