"""Checks of arguments: what came, and what is allowed."""

import math
from numbers import Integral, Real

__all__ = ["expect", "is_number", "is_whole"]


def expect(name: str, value: object, expected: str, fulfilled: bool) -> None:
    """Raise ValueError, naming an argument and what came, unless it is as expected.

    >>> expect("epochs", 0, "a whole number from 1", fulfilled=False)
    Traceback (most recent call last):
    ...
    ValueError: epochs = 0: expected a whole number from 1
    """
    if not fulfilled:
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def is_whole(value: object, *, least: int = 0) -> bool:
    """Say whether a value is a whole number, from ``least`` on.

    >>> is_whole(3), is_whole(True), is_whole(3.0), is_whole(0, least=1)
    (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_number(value: object) -> bool:
    """Say whether a value is a finite number.

    >>> is_number(1e-3), is_number(True), is_number(math.nan), is_number("1")
    (True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
