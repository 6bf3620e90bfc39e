"""Types of settings, checked by pydantic, whose errors have the value and the allowed values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, validate_call

Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# Checks the arguments of a function by their annotations; raises pydantic's ValidationError, a ValueError.
validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))


class Schema(BaseModel, strict=True, extra="forbid"):
    """The entries that a part of a file may have, with their types; no others."""
