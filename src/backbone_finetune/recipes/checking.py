"""Types of settings, which pydantic checks: an error names what came and what is allowed."""

from typing import Annotated

from pydantic import ConfigDict, Field, validate_call

Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Checks the arguments of a function by their annotations; what is wrong is pydantic's ValidationError, a ValueError.
validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True))
