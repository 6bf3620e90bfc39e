"""Phases: a training run is a list of them, each with its own share of the network that trains, and its own rates."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..checking import expect, is_number, is_whole

__all__ = ["Phase", "read_phases"]


@dataclass(frozen=True)
class Phase:
    """A stretch of training in which the same layers train: how long, which ones, how fast.

    ``trainable_groups`` counts layer groups of the backbone from its output; 0 trains the classifier alone.
    ``layer_decay`` lets the rates fall towards the input, as BEiT does. ``warmup_epochs``, which may be a fraction,
    lets them rise from 0, and ``cosine`` lets them fall to 0 at the end (Loshchilov and Hutter, 2017).

    Head first, then everything (LP-FT, Kumar et al. 2022):

    >>> [phase.epochs for phase in (Phase(epochs=20), Phase(epochs=5, trainable_groups=5, lr=1e-4, cosine=True))]
    [20, 5]

    Raises:
        ValueError: an entry is of the wrong kind or out of range.
    """

    epochs: int = 30
    trainable_groups: int = 0
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    layer_decay: float | None = None
    weight_decay: float = 0.01
    warmup_epochs: float = 0.0
    cosine: bool = False

    def __post_init__(self) -> None:
        """See that each entry is of its kind and in its range."""
        for field in fields(self):
            if hasattr(value := getattr(self, field.name), "item"):  # a number of NumPy's, which JSON does not know
                object.__setattr__(self, field.name, value.item())
        self.expect("epochs", "a whole number from 1", is_whole(self.epochs, least=1))
        self.expect("trainable_groups", "a whole number from 0", is_whole(self.trainable_groups))
        self.expect("lr", "a number above 0", is_number(self.lr) and self.lr > 0)
        self.expect("backbone_lr", "a number above 0", is_number(self.backbone_lr) and self.backbone_lr > 0)
        falls = self.layer_decay is None or (is_number(self.layer_decay) and 0 < self.layer_decay <= 1)
        self.expect("layer_decay", "a number above 0, up to 1", falls)
        self.expect("weight_decay", "a number from 0", is_number(self.weight_decay) and self.weight_decay >= 0)
        rises = is_number(self.warmup_epochs) and 0 <= self.warmup_epochs <= self.epochs
        self.expect("warmup_epochs", f"a number from 0 to its {self.epochs} epochs", rises)
        self.expect("cosine", "true or false", isinstance(self.cosine, bool))

    def expect(self, name: str, expected: str, fulfilled: bool) -> None:
        """Raise ValueError, naming an entry and what came, unless it is as expected."""
        expect(name, getattr(self, name), expected, fulfilled)


def read_phases(path: Path) -> tuple[Phase, ...]:
    r"""Read the phases of a run from a TOML file: a ``[[phases]]`` table each, with the entries of a `Phase`.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "phases.toml")
    ...     _ = path.write_text("[[phases]]\nepochs = 20\n\n[[phases]]\nepochs = 5\ntrainable_groups = 1\n")
    ...     [(phase.epochs, phase.trainable_groups) for phase in read_phases(path)]
    [(20, 0), (5, 1)]

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file or no TOML, has no phases, or a phase has an unknown or unfit entry.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; pass a TOML file with [[phases]] tables")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; pass a TOML file with [[phases]] tables") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error})") from error
    tables = content.pop("phases", None)
    if content:
        raise ValueError(f"{path}: {next(iter(content))!r} is unknown; the file holds [[phases]] tables only")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, Mapping) for table in tables):
        raise ValueError(f"{path}: no phases; give each a [[phases]] table with some of {allowed_keys()}")
    return tuple(parse_phase(table, f"{path}, phase {number}") for number, table in enumerate(tables, start=1))


def parse_phase(table: Mapping[str, Any], place: str) -> Phase:
    """Make a phase of a TOML table; errors begin with the place of it.

    >>> parse_phase({"epoch": 3}, "phases.toml, phase 1")
    Traceback (most recent call last):
    ...
    ValueError: phases.toml, phase 1: 'epoch' is unknown; allowed are epochs, trainable_groups, ...
    """
    for key in table:
        if key not in {field.name for field in fields(Phase)}:
            raise ValueError(f"{place}: {key!r} is unknown; allowed are {allowed_keys()}")
    try:
        return Phase(**table)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; allowed are {allowed_keys()}") from error


def allowed_keys() -> str:
    """List the entries of a phase.

    >>> allowed_keys().split(", ")[:2]
    ['epochs', 'trainable_groups']
    """
    return ", ".join(field.name for field in fields(Phase))
