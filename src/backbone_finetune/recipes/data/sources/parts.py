"""The images to train, validate and test on: as the data is split, or with some held out; and what is doubtful."""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from backbone_finetune.names import shortened

from ...text import printable
from ..groups import split
from ..images import LabelledFolder
from .finding import choose_test, find_splits, has_columns
from .rows import SEPARATORS, TEST, TRAIN, VALIDATION
from .tables import TABLES

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2


def find_data(
    path: Path,
    *,
    validation: Path | None = None,
    test: Path | None = None,
    chooses: bool | None = None,
    test_share: float,
    seed: int,
    values: Sequence[str] = (),
    group: str | None = None,
) -> dict[str, LabelledFolder]:
    """Find the images of a run, and log them: "train", and "validation" and "test" if there are any.

    See `find_splits`. Groups that are in two of the parts are logged.

    Args:
        path: The folder or table.
        validation: Another folder or table of validation images; of several parts its own, or else as for a test.
        test: Another folder or table of test images.
        chooses: Whether something is chosen on the validation images. Then they are not test images too, and if
            there are none, a fifth of the training images is held out for it. None is yes where there is a test, or
            where images have several labels, whose thresholds are chosen.
        test_share: The share of each class to test on if there are neither test nor validation images.
        seed: Seed of the held-out images.
        values: The columns of a table whose numbers are predicted.
        group: The column of a table whose groups are held out as wholes; by default ``group``, if there is one.
    """
    parts = find_splits(path, values=values, group=group)
    train = parts[TRAIN]
    are_classes = isinstance(train.targets[0], int)
    if not values and (hint := _doubt_column(train)):
        logger.warning("%s: %s", printable(path), printable(hint))
    if chooses is None and not values and not are_classes:
        chooses = True
    for part, other in ((VALIDATION, validation), (TEST, test)):
        if other is not None:
            column = group if has_columns(other) else None
            found = find_splits(other, train.class_names, values, column)
            parts[part] = found.get(part) or choose_test(found)[1]
    each = ("of each class" if are_classes else "of the images") + ", by groups" * (train.groups is not None)
    notes: dict[str, str] = {}
    if len(parts) == 1:
        parts[TRAIN], parts[TEST] = split(train, test_share=test_share, seed=seed)
        notes[TEST] = f", {100 * test_share:.0f} % {each}, held out"
    elif TEST not in parts and not chooses:
        parts[TEST] = parts.pop(VALIDATION)
        notes[TEST] = ", the validation images, as nothing is chosen on them"
    if chooses and VALIDATION not in parts:
        parts[TRAIN], parts[VALIDATION] = split(parts[TRAIN], test_share=VALIDATION_SHARE, seed=seed)
        notes[VALIDATION] = f", {100 * VALIDATION_SHARE:.0f} % {each} of the rest, held out"
    _log_parts(parts, notes, values)
    _log_shared_groups(parts)
    return {part: parts[part] for part in (TRAIN, VALIDATION, TEST) if part in parts}


def _log_parts(parts: Mapping[str, LabelledFolder], notes: Mapping[str, str], values: Sequence[str]) -> None:
    """Log the number of images of each part, and of each class in it, or the range of values."""
    for name, images in parts.items():
        logger.info("%s: %d images from %s%s", name, len(images.paths), printable(images.root), notes.get(name, ""))
    counts = [_describe_targets(images, values) for images in parts.values()]
    lines = [f"{name} {' + '.join(shown)}" for name, *shown in zip(parts[TRAIN].class_names, *counts, strict=True)]
    what = "values" if values else "images by class"
    logger.info("%s, %s: %s", what, " + ".join(parts), printable(shortened(lines, most=20)))


def _log_shared_groups(parts: Mapping[str, LabelledFolder]) -> None:
    """Log the groups that have images in two parts."""
    for earlier, later in combinations(parts, 2):
        if shared := sorted(set(parts[earlier].groups or ()) & set(parts[later].groups or ())):
            logger.warning(
                "%d groups have images in both %s and %s, which may make the %s accuracy too high: %s",
                *(len(shared), earlier, later, later, printable(shortened(shared))),
            )


def _doubt_column(train: LabelledFolder) -> str | None:
    """Return a hint if a table's column seems to be named for targets of the other kind."""
    if not isinstance(train.targets[0], int):
        one_each = all(sorted(row)[-2:] in ([1.0], [0.0, 1.0]) for row in train.targets)
        return "each image has one label; name the column label to train one class per image" if one_each else None
    if train.root.suffix.lower() not in TABLES:
        return None
    if joined := [name for name in train.class_names if re.search(SEPARATORS, name)]:
        return f"{joined[0]} is one class; name the column labels to train its labels"
    are_numbers = all(re.fullmatch(r"-?\d*\.\d+", name) for name in train.class_names)
    return f"{train.class_names[0]} is one class; --regression COLUMN predicts numbers" if are_numbers else None


def _describe_targets(images: LabelledFolder, values: Sequence[str]) -> list[str]:
    """Return the number of images of each class, or the range of each value."""
    if isinstance(images.targets[0], int):
        counts = Counter(images.targets)
        return [str(counts[target]) for target in range(len(images.class_names))]
    columns = zip(*images.targets, strict=True)
    return [f"{min(column):g} to {max(column):g}" if values else str(int(sum(column))) for column in columns]
