"""Everything that the documentation names, and that functions raise or return, can be imported."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import backbone_finetune
from backbone_finetune import recipes

ROOM = Path(inspect.getfile(recipes)).parent


def names_of_ours() -> set[str]:
    """Return the classes and functions that the files of the recipes define."""
    found = set()
    for module in pkgutil.walk_packages(recipes.__path__, f"{recipes.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if getattr(value, "__module__", "").startswith("backbone_finetune.recipes") and not name.startswith("_"):
                found.add(name)
    return found


def is_public(name: str) -> bool:
    return name in recipes.__all__ or hasattr(backbone_finetune, name)


def test_names_in_the_documentation_are_public() -> None:
    texts = {name: inspect.getdoc(getattr(recipes, name)) or "" for name in recipes.__all__}
    texts["README.md"] = (ROOM / "README.md").read_text(encoding="utf-8")
    ours = names_of_ours()
    assert {"fit_heads", "find_base"} <= ours
    for place, text in texts.items():
        named = set(re.findall(r"`+([A-Za-z]\w+)(?:[.(][^`]*)?`+", text)) | set(re.findall(r"(\w+Error):", text))
        assert [name for name in sorted(named & ours) if not is_public(name)] == [], place


def test_return_types_of_functions_are_public() -> None:
    ours = names_of_ours()
    for name in recipes.__all__:
        if inspect.isfunction(function := inspect.unwrap(getattr(recipes, name))):
            returned = set(re.findall(r"recipes[\w.]*\.(\w+)", str(typing.get_type_hints(function).get("return"))))
            assert [each for each in sorted(returned & ours) if not is_public(each)] == [], name
