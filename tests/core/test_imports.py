"""The core needs torch and timm alone; within the recipes, imports go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import backbone_finetune

RECIPES = Path(backbone_finetune.__file__).parent / "recipes"
LIST_MODULES = "import sys; {}; print('\\n'.join(sorted(sys.modules)))"


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-W", "error", "-c", LIST_MODULES.format(statement)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_core_loads_nothing_that_torch_and_timm_do_not() -> None:
    beyond = modules_after("import backbone_finetune") - modules_after("import torch, timm")
    assert {name for name in beyond if not name.startswith("backbone_finetune")} == set()
    assert not any(name.startswith(("backbone_finetune.recipes", "backbone_finetune.cli")) for name in beyond)


# Each room may import from those below it; the leaves at the end import from none.
ROOMS = (
    "cli",
    "commands",
    "training",
    "heads",
    "features",
    "models",
    "data",
    "checking",
    "files",
    "rng",
    "text",
    "together",
)


def rooms_imported(path: Path) -> set[str]:
    """Name the rooms of the recipes that a file imports from: ``from ..data.images import read_image`` is of data."""
    here = path.relative_to(RECIPES).parent.parts if path.is_relative_to(RECIPES) else ()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or "").split(".")
        if node.level:
            parents = len(here) + 1 - node.level  # from recipes/ inwards; below 0, out of it
            names = [*here[:parents], *names] if parents >= 0 else []
        elif names[:2] == ["backbone_finetune", "recipes"]:
            names = names[2:]
        else:
            continue
        found.update({names[0]} if names and names[0] else ({alias.name for alias in node.names} if names else ()))
    return found


def test_the_recipes_import_one_way() -> None:
    for path in RECIPES.rglob("*.py"):
        room = path.relative_to(RECIPES).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        above = ROOMS[: ROOMS.index(room)]
        assert rooms_imported(path) & set(above) == set(), f"{path.relative_to(RECIPES)} imports from a room above"
        assert rooms_imported(path) <= set(ROOMS), path


def test_the_recipes_load_no_matplotlib() -> None:
    assert "matplotlib" not in modules_after("import backbone_finetune.recipes")
