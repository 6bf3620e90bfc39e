"""What is known of one architecture of timm: a line of the support matrix."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Structure:
    """What shapes and names tell, on the meta device."""

    name: str
    family: str
    parameters: int
    default_classes: int
    input_size: tuple[int, ...]
    refused: str | None  # why it does not wrap
    signature: str  # networks with the same one lose the same modules to `reset_classifier`
    width: int | None = None
    num_features: int | None = None
    round_trip_refused: str | None = None  # why `to_module()` gives no plain network with a fresh classifier
    layer_groups: tuple[str, ...] = ()
    last_group_share: float | None = None  # of the backbone's parameters: what `trainable_groups=1` trains
    grouped_by: str | None = None
    walked_through: tuple[str, ...] = ()  # "earlier after later", empty where each first k groups are a prefix
    running_statistics: int = 0
    random_operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class Values:
    """What real values tell."""

    name: str
    input_size: tuple[int, ...]
    classes: int
    logits_spread: float  # the largest minus the smallest: the comparisons mean nothing where it is 0
    keep_refused: str | None
    keep_difference: float | None  # of the wrapped network's logits from the bare one's, the largest
    keep_round_trip: str | None  # "equal", or how `to_module()` of the kept classifier fails
    fresh_round_trip: str | None  # the same with a fresh classifier


@dataclass(frozen=True)
class Kept:
    """Whether a network's own classifier is kept, and how that was decided."""

    kept: bool | None  # None: nobody has looked
    proof: str  # values or structure
    difference: float | None
    reason: str | None
    like: str | None  # the architecture whose values decided, where the proof is by structure


def write_line(path: Path, kind: str, record: Structure | Values) -> None:
    """Append one record, so that an interrupted run goes on where it stopped."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"kind": kind, **vars(record)}) + "\n")


def read_lines(path: Path) -> tuple[dict[str, Structure], dict[str, Values]]:
    """Read what earlier runs appended; a last line that was cut off is dropped, and its architecture done again."""
    structures: dict[str, Structure] = {}
    values: dict[str, Values] = {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            path.write_text(text[: -len(line)], encoding="utf-8")
            break
        fields: dict[str, Any] = json.loads(line)
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        if fields.pop("kind") == "structure":
            structures[fields["name"]] = Structure(**fields)
        else:
            values[fields["name"]] = Values(**fields)
    return structures, values


def decide_kept(structure: Structure, values: dict[str, Values], of_signature: Iterable[str]) -> Kept:
    """By its own values where they were run, else by those of every network that loses the same modules."""
    if structure.refused is not None:
        return Kept(False, "structure", None, structure.refused, None)
    own = values.get(structure.name)
    if own is not None:
        return Kept(own.keep_refused is None, "values", own.keep_difference, own.keep_refused, None)
    alike = [values[name] for name in of_signature if name in values]
    if not alike or len({other.keep_refused is None for other in alike}) != 1:
        return Kept(None, "structure", None, "no network of this structure was run with values", None)
    return Kept(alike[0].keep_refused is None, "structure", None, alike[0].keep_refused, alike[0].name)


def first_sentence(error: BaseException, most: int = 200) -> str:
    """Shorten an error to what it says before its remedy."""
    text = " ".join(str(error).split()).partition("; ")[0]
    return text if len(text) <= most else text[: most - 3] + "..."


def as_row(structure: Structure, values: Values | None, kept: Kept) -> dict[str, Any]:
    """One line of the published matrix, without what only a resumed run needs."""
    row = {key: value for key, value in vars(structure).items() if key != "signature"}
    row |= {"kept": kept.kept, "kept_proof": kept.proof, "kept_difference": kept.difference}
    row |= {"kept_refused": kept.reason, "kept_like": kept.like}
    if values is not None:
        row["values"] = {key: value for key, value in vars(values).items() if not key.startswith("keep_ref")}
        row["values"].pop("name")
    return row
