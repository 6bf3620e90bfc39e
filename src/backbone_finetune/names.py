"""Lists of names in messages."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(names: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Join names for a message, the first ones if they are many.

    >>> shortened(["conv1.weight", "conv1.bias", "fc.weight", "fc.bias"], most=2)
    'conv1.weight, conv1.bias and 2 more'
    """
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
