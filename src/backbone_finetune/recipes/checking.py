"""Checks of arguments: what came, and what is allowed."""

from numbers import Integral
from typing import Annotated

from pydantic import ConfigDict, Field, validate_call

__all__ = ["NotNegative", "Positive", "Whole", "expect", "is_whole", "validated"]

Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Checks the arguments of a function by their annotations. What is wrong is a ValidationError, which is a ValueError and
# names each argument, what came and what is allowed.
validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


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
