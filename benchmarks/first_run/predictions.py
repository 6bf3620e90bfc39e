"""What was predicted before any card was there, to stand beside what a card says.

Estimates for an H100 SXM from reading the code at commit 77102b5 (torch 2.14.1), none of them measured; within 30 % was
the hope. They are kept as they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.ratios import Paired
from harness.results import median

PREDICTED_FOR = "H100"
Read = Callable[[Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class Prediction:
    """A range for one number of one part; `read` finds that number in the part's JSON, None where it is not there."""

    part: str
    what: str
    low: float
    high: float
    read: Read


def list_predictions() -> Iterator[Prediction]:
    """List all that was predicted."""
    for (part, variant), ranges in _BACKWARD.items():
        for name, (low, high) in ranges.items():
            yield Prediction(part, f"{variant}, {_NAMES[name]}", low, high, _of_row(variant, name))
    for part in ("backward_float32", "backward_bf16"):
        yield Prediction(part, "step, frozen / unfrozen", 0.25, 0.38, _ratio_of_steps)
        yield Prediction(part, "A/A of the unfrozen backward, distance from 1", 0.0, 0.02, _noise("unfrozen"))
        yield Prediction(part, "A/A of the frozen backward, distance from 1", 0.0, 0.10, _noise("frozen"))
    for what, low, high in (
        ("frozen backward / bare head's backward", 0.95, 1.05),
        ("frozen step, bf16 and channels last / float32", 0.35, 0.50),
    ):
        yield Prediction("targets", what, low, high, _target(what))
    yield Prediction("feature_cache", "heads together / one by one", 0.03, 0.06, _target("heads together / one by one"))


_NAMES = {
    "forward_ms": "forward ms",
    "backward_ms": "backward ms",
    "optimizer_ms": "fused optimizer ms",
    "step_ms": "step ms",
    "peak_bytes": "peak GB",
    "backward_kernels": "kernels in a backward",
    "backward_device_ms": "kernels of a backward, ms",
}
_BARE_HEAD = {
    "forward_ms": (9, 12),
    "backward_ms": (0.10, 0.20),
    "optimizer_ms": (0.10, 0.15),
    "step_ms": (10, 13),
    "peak_bytes": (0.7, 0.9),
    "backward_kernels": (5, 7),
    "backward_device_ms": (0.015, 0.025),
}
# resnet50 at 224 pixels: a batch of 64 in float32 (TF32 convolutions), one of 256 in bf16 and channels last.
_BACKWARD: dict[tuple[str, str], dict[str, tuple[float, float]]] = {
    ("backward_float32", "unfrozen"): {
        "forward_ms": (12, 15),
        "backward_ms": (26, 33),
        "optimizer_ms": (0.3, 0.5),
        "step_ms": (40, 50),
        "peak_bytes": (6.0, 6.6),
        "backward_kernels": (250, 400),
    },
    ("backward_float32", "frozen"): _BARE_HEAD,
    ("backward_float32", "limit"): _BARE_HEAD,
    ("backward_bf16", "unfrozen"): {
        "forward_ms": (25, 30),
        "backward_ms": (48, 60),
        "optimizer_ms": (0.3, 0.5),
        "step_ms": (78, 92),
        "peak_bytes": (11, 14),
    },
    ("backward_bf16", "frozen"): {
        "forward_ms": (25, 32),
        "backward_ms": (0.15, 0.30),
        "optimizer_ms": (0.10, 0.15),
        "step_ms": (26, 33),
        "peak_bytes": (1.5, 2.0),
    },
}


def _row(rows: list[dict[str, Any]], variant: str) -> dict[str, Any] | None:
    """Find a variant of the first model."""
    return next((row for row in rows if row["variant"] == variant and row["model"] == rows[0]["model"]), None)


def _of_row(variant: str, name: str) -> Read:
    def read(content: Mapping[str, Any]) -> float | None:
        row = _row(content["rows"], variant)
        value = None if row is None else row[name]
        if isinstance(value, list):
            return median(value) if value else None
        return value / 1e9 if value is not None and name.endswith("_bytes") else value

    return read


def _ratio_of_steps(content: Mapping[str, Any]) -> float | None:
    frozen, unfrozen = (_row(content["rows"], variant) for variant in ("frozen", "unfrozen"))
    return None if frozen is None or unfrozen is None else Paired(frozen["step_ms"], unfrozen["step_ms"]).ratio.median


def _noise(variant: str) -> Read:
    def read(content: Mapping[str, Any]) -> float | None:
        first, again = _row(content["rows"], variant), _row(content["noise"], variant)
        if first is None or again is None:
            return None
        return abs(Paired(again["backward_ms"], first["backward_ms"]).ratio.median - 1)

    return read


def _target(what: str) -> Read:
    """Find the ratio of a target by a part of its name; of several models' the one that is furthest from 1."""

    def read(content: Mapping[str, Any]) -> float | None:
        ratios = [
            target["ratio"]["median"] for target in content["targets"] if what in target["what"] and target["ratio"]
        ]
        return max(ratios, key=lambda ratio: abs(ratio - 1), default=None)

    return read
