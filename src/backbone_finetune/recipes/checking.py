"""Types of settings, which pydantic checks: an error names what came and what is allowed."""

from numbers import Integral
from typing import Annotated

from pydantic import ConfigDict, Field, validate_call

__all__ = ["NotNegative", "Positive", "Whole", "expect", "is_whole", "validated"]

Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Checks the arguments of a function by their annotations; what is wrong is pydantic's ValidationError, a ValueError.
validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


def expect(name: str, value: object, expected: str, fulfilled: bool) -> None:
    """Raise ValueError, naming an argument and what came, unless it is as expected."""
    if not fulfilled:
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def is_whole(value: object, *, least: int = 0) -> bool:
    """Say whether a value is a whole number, from ``least`` on."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
