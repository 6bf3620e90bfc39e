"""The support matrix as one page: totals, what is refused and why, and a line per family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def as_markdown(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """Summarise the rows of the matrix by family."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    lines = [
        "# timm's zoo in FineTuneModel",
        "",
        f"`{environment['command']}`, {environment['date']}, timm {environment['timm']}, torch {environment['torch']}, "
        f"{environment['cpu']}. A line per architecture, and why: `timm_zoo.json`.",
        "",
        *_totals(rows, len(families)),
        "",
        "## Refused",
        "",
        *_refusals(rows, "to wrap", "refused"),
        *_refusals([row for row in rows if not row["refused"]], "to keep its own classifier", "kept_refused"),
        *_refusals(rows, "to_module() with a fresh linear classifier", "round_trip_refused"),
        "",
        "## By family",
        "",
        "Numbers are architectures; groups are the fewest and the most layer groups of one. *Prefix*: freezing the "
        "first k groups, for any k, leaves nothing frozen that is computed from a result of a group that trains, so "
        "backward ends where training does. *Random*: in train mode, by default.",
        "",
        "| family | all | wrap | keep | back, kept | back, fresh | groups | prefix | running statistics | random |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_family_line(name, members) for name, members in sorted(families.items())),
    ]
    return "\n".join(lines) + "\n"


def _totals(rows: Sequence[Row], family_count: int) -> list[str]:
    wrapped = [row for row in rows if not row["refused"]]
    kept = [row for row in wrapped if row["kept"]]
    own = [row for row in kept if row["default_classes"]]
    by_values = [row for row in wrapped if row["kept_proof"] == "values"]
    compared = [row["values"] for row in rows if "values" in row]
    exact = sum(values["keep_difference"] == 0.0 for values in compared)
    inexact = [v["keep_difference"] / v["logits_spread"] for v in compared if v["keep_difference"]]
    counts = Counter(row["grouped_by"] for row in wrapped)
    sizes = [len(row["layer_groups"]) for row in wrapped]
    stay = [row for row in wrapped if row["round_trip_refused"] and not row["kept"]]
    own_only = [row for row in wrapped if row["round_trip_refused"] and row["kept"]]
    not_prefix = sum(bool(row["walked_through"]) for row in wrapped)
    return [
        f"- **{len(wrapped)}** of {len(rows)} architectures in {family_count} families wrap with `num_classes=...`; "
        f"for {sum(row['num_features'] != row['width'] for row in wrapped)} of them timm's `num_features` is not the "
        "width of the classifier.",
        f"- **{len(kept)}** keep their own classifier as provably the same function: {len(own)} the one that they have "
        f"by default, {len(kept) - len(own)} the one that `create_model(..., num_classes=...)` gives, since they have "
        f"none by default. Decided by real values for {len(by_values)}; for the others by a network of the same family "
        "that loses the same modules to `reset_classifier` and was run with values (`kept_like`).",
        f"- Logits of the wrapped and the bare network: bit for bit equal for {exact} of the {exact + len(inexact)} "
        f"that were run and kept; else apart by at most {max(inexact, default=0.0):.0e} of their spread.",
        f"- `to_module()` gives timm's own network again, all names and logits equal, for "
        f"**{sum(not row['round_trip_refused'] for row in wrapped)}** with a fresh linear classifier, and for every "
        f"kept one that was run: {sum(v['keep_round_trip'] == 'equal' for v in compared)} of "
        f"{sum(v['keep_round_trip'] is not None for v in compared)}. The other {len(stay) + len(own_only)} have more "
        f"than a linear layer for a head: **{len(own_only)}** of them keep their own and go back with it alone; "
        f"**{len(stay)}** ({_by_family(stay)}) can't keep it, and do not go back.",
        f"- Layer groups: {min(sizes, default=0)} to {max(sizes, default=0)}, most often "
        f"{max(set(sizes), key=sizes.count, default=0)}; found by "
        + ", ".join(f"`{name}` for {count}" for name, count in counts.most_common())
        + ".",
        _last_groups(wrapped),
        f"- The first k groups are a prefix of the computation, whatever k, for {len(wrapped) - not_prefix}; "
        f"for the other {not_prefix} freezing is as right, and saves less.",
        f"- {sum(row['running_statistics'] > 0 for row in wrapped)} hold running statistics; "
        f"{sum(bool(row['random_operators']) for row in wrapped)} are random in train mode by default.",
    ]


def _last_groups(wrapped: Sequence[Row]) -> str:
    """What `trainable_groups=1` trains."""
    shares = sorted((row["last_group_share"], row["name"]) for row in wrapped)
    if not shares:
        return "- No architecture wraps."
    most = [name for share, name in shares if share > 0.8]
    return (
        f"- `trainable_groups=1` trains {shares[0][0]:.1%} ({shares[0][1]}) to {shares[-1][0]:.1%} ({shares[-1][1]}) "
        f"of the backbone, {shares[len(shares) // 2][0]:.0%} in the middle; more than 80 % for {len(most)}"
        f"{': ' if most else ''}{', '.join(most)}. A last norm or table of positions goes with the block before it."
    )


def _refusals(rows: Iterable[Row], what: str, key: str) -> list[str]:
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        if row[key]:
            by_reason.setdefault(_without_kind(row[key]), []).append(row)
    lines = []
    for reason, members in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        lines.append(f"- {what}: {len(members)} ({_by_family(members)}): {reason}")
    return lines


def _by_family(members: Iterable[Row], everything: Iterable[Row] = ()) -> str:
    """Count by family, of how many where `everything` is given."""
    all_of = Counter(row["family"] for row in everything)
    counts = Counter(row["family"] for row in members)
    return ", ".join(
        f"{family} {count}{f' of {all_of[family]}' if family in all_of else ''}"
        for family, count in counts.most_common()
    )


def _without_kind(reason: str) -> str:
    """The reason alone, without the name of the class and the figures, which differ from network to network."""
    for known in (
        "no classifier to take off",
        "not one that takes one feature vector",
        "not the same function any more",
        "more in its classifier than one linear layer",
    ):
        if known in reason:
            return known
    return reason


def _family_line(name: str, members: Sequence[Row]) -> str:
    wrapped = [row for row in members if not row["refused"]]
    sizes = sorted({len(row["layer_groups"]) for row in wrapped})
    groups = " to ".join(map(str, sizes[:1] + sizes[1:][-1:]))
    values = [row["values"] for row in members if "values" in row]
    tried = [v for v in values if v["keep_round_trip"] is not None]
    cells = [
        name,
        len(members),
        len(wrapped),
        sum(bool(row["kept"]) for row in wrapped),
        f"{sum(v['keep_round_trip'] == 'equal' for v in tried)} of {len(tried)} run",
        sum(not row["round_trip_refused"] for row in wrapped),
        groups,
        sum(not row["walked_through"] for row in wrapped),
        sum(row["running_statistics"] > 0 for row in wrapped),
        sum(bool(row["random_operators"]) for row in wrapped),
    ]
    return f"| {' | '.join(map(str, cells))} |"
