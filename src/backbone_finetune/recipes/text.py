"""Text that is safe to print in a terminal, and short."""

import sys
import unicodedata
from io import TextIOWrapper

from pydantic import ValidationError


def has_control_characters(text: str) -> bool:
    """Return whether a text has control characters."""
    return any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in text)


def printable(value: object) -> str:
    """Replace each control character of a value's text."""
    return "".join("\N{REPLACEMENT CHARACTER}" if has_control_characters(c) else c for c in str(value))


def one_line(value: object, *, most: int = 80) -> str:
    """Format a value on one line of at most ``most`` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def describe_fault(error: ValidationError) -> str:
    """Format pydantic's first error as "epochs = 0: input should be greater than or equal to 1"."""
    fault = error.errors(include_url=False)[0]
    place = " ".join(part if isinstance(part, str) else str(part + 1) for part in fault["loc"])
    came = "" if fault["type"] == "missing" else f" = {one_line(repr(fault['input']))}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{place}{came}: {message}" if place else message


def print_any_name() -> None:
    """Let stdout and stderr escape characters outside of their encoding, such as undecodable bytes of a file name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
