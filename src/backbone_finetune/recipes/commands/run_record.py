"""``run.json``: what run it is, written so that it can be given again, and read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..data.fingerprint import backbone_fingerprint
from ..features.backbone_pass import autocast_dtype
from ..models.metadata import installed_versions
from ..training.loop import TrainerConfig
from ..training.phases import parse_phase
from .run_folder import find_differences
from .setup import Task, TrainSettings

__all__ = ["compare_runs", "read_run", "record_run"]

# The folder may be moved, overwriting is how it began, and the rest changes nothing of the model.
NOT_RECORDED = {"output", "overwrite", "baselines"}
PATHS = {"images", "checkpoint"}


def record_run(
    settings: TrainSettings, task: Task, loop: TrainerConfig, fingerprints: tuple[str, str]
) -> dict[str, Any]:
    """Write down what a run is: its settings, as they came out, and what its versions, images and backbone are.

    Paths are absolute in it, so that it can be given again from anywhere, and precisions those that are used here.
    """
    accelerator = loop.accelerator
    arguments = {name: value for name, value in asdict(settings).items() if name not in NOT_RECORDED}
    for name in PATHS:
        arguments[name] = None if arguments[name] is None else str(arguments[name].absolute())
    arguments["mixed_precision"] = accelerator.mixed_precision
    arguments["autocast_features"] = (
        loop.autocast_features and autocast_dtype(task.model.backbone, accelerator.device) is not None
    )
    return {
        "arguments": arguments,
        "versions": installed_versions(),
        "train_images": {"count": len(task.train), "digest": fingerprints[0]},
        "test_images": {"count": len(task.test), "digest": fingerprints[1]},
        "backbone_digest": backbone_fingerprint(task.model.backbone),
    }


def compare_runs(recorded: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """Name what a run that is given again does not have as it was: versions, images, backbone, or a precision.

    >>> compare_runs({"backbone_digest": "a"}, {"backbone_digest": "b"})
    ['backbone_digest: "a" there, "b" here']
    """

    def compared(run: Mapping[str, Any]) -> dict[str, Any]:
        arguments = run.get("arguments", {})
        precisions = {name: arguments[name] for name in ("mixed_precision", "autocast_features") if name in arguments}
        return {**{name: part for name, part in run.items() if name != "arguments"}, **precisions}

    return find_differences(compared(recorded), compared(record))


def read_run(path: Path) -> tuple[TrainSettings, dict[str, Any]]:
    """Read a ``run.json``: the settings, with the default output folder, and the whole record.

    >>> read_run(Path("nowhere.json"))
    Traceback (most recent call last):
    ...
    FileNotFoundError: nowhere.json: there is no such file; pass the run.json that a training run wrote

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no record of a run; the message says why.
    """
    wanted = "pass the run.json that a training run wrote"
    if not path.is_file():
        kind = ValueError(f"{path} is no file; {wanted}")
        raise kind if path.exists() else FileNotFoundError(f"{path}: there is no such file; {wanted}")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); {wanted}") from error
    arguments = record.get("arguments") if isinstance(record, dict) else None
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: no arguments in it; {wanted}")
    names = {field.name for field in fields(TrainSettings)} - NOT_RECORDED
    if faulty := sorted(names ^ arguments.keys()):
        raise ValueError(f"{path}: {faulty[0][:80]!r} is {'missing' if faulty[0] in names else 'unknown'}; {wanted}")
    for name, (is_allowed, expected) in KINDS.items():
        if not is_allowed(arguments[name]):
            raise ValueError(f"{path}: {name} = {arguments[name]!r}: expected {expected}")
    phases = tuple(
        parse_phase(table, f"{path}, phase {number}") for number, table in enumerate(arguments["phases"], start=1)
    )
    paths = {name: None if arguments[name] is None else Path(arguments[name]) for name in PATHS}
    try:
        return TrainSettings(**{**arguments, **paths, "phases": phases}), record
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_text_or_none(value: object) -> bool:
    """Say whether a value is a text, or null.

    >>> is_text_or_none("cpu"), is_text_or_none(None), is_text_or_none(1)
    (True, True, False)
    """
    return value is None or isinstance(value, str)


TRUTH = (lambda value: isinstance(value, bool), "true or false")
KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("images", "architecture", "checkpoint"), (is_text_or_none, "a text or null")),
    **dict.fromkeys(("pretrained", "trainable_only", "autocast_features"), TRUTH),
    "device": (lambda value: isinstance(value, str), "a text"),
    "phases": (
        lambda value: isinstance(value, list) and all(isinstance(table, dict) for table in value),
        "a list of phases",
    ),
}
