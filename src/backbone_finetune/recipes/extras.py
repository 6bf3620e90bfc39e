"""Import of packages of the extras."""

import importlib
from typing import Any


def import_extra(name: str, extra: str) -> Any:
    """Import a package of an extra.

    >>> import_extra("no_such_package", "onnx")
    Traceback (most recent call last):
    ...
    ModuleNotFoundError: no_such_package is not installed; run: pip install 'backbone-finetune[onnx]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} is not installed; run: pip install 'backbone-finetune[{extra}]'") from error
