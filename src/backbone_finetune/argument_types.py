"""The numbers that the command line takes: each is read, checked, or refused with what was expected."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

__all__ = ["natural_number", "non_negative_number", "positive_integer", "positive_number", "share_above_zero"]

NumberT = TypeVar("NumberT", int, float)


def positive_integer(text: str) -> int:
    """Read 1, 2, 3, ...

    >>> positive_integer("3")
    3
    """
    return checked(text, int, "a whole number from 1", lambda value: value >= 1)


def natural_number(text: str) -> int:
    """Read 0, 1, 2, ... up to what a seed may be.

    >>> natural_number("0")
    0
    """
    return checked(text, int, "a whole number from 0", lambda value: 0 <= value < 2**63)


def positive_number(text: str) -> float:
    """Read a number above 0.

    >>> positive_number("1e-3")
    0.001
    """
    return checked(text, float, "a number above 0", lambda value: 0 < value < math.inf)


def non_negative_number(text: str) -> float:
    """Read a number from 0.

    >>> non_negative_number("0")
    0.0
    """
    return checked(text, float, "a number from 0", lambda value: 0 <= value < math.inf)


def share_above_zero(text: str) -> float:
    """Read a number above 0, up to 1.

    >>> share_above_zero("0.75")
    0.75
    """
    return checked(text, float, "a number above 0, up to 1", lambda value: 0 < value <= 1)


def checked(text: str, read: Callable[[str], NumberT], expected: str, is_allowed: Callable[[NumberT], bool]) -> NumberT:
    """Read a number and check it, or tell argparse what was expected.

    >>> checked("0", int, "a whole number from 1", lambda value: value >= 1)
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: '0': expected a whole number from 1
    """
    try:
        value = read(text)
    except ValueError:
        pass
    else:
        if is_allowed(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
