"""The core imports only torch and timm; imports between the folders of the recipes go one way."""

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


def test_the_core_imports_only_torch_and_timm() -> None:
    beyond = modules_after("import backbone_finetune") - modules_after("import torch, timm")
    assert {name for name in beyond if not name.startswith("backbone_finetune")} == set()
    assert not any(name.startswith(("backbone_finetune.recipes", "backbone_finetune.cli")) for name in beyond)


# Each folder may import from those below it.
FOLDERS = (
    "cli",
    "commands",
    "export",
    "training",
    "heads",
    "features",
    "models",
    "objectives",
    "data",
    "checking",
    "extras",
    "files",
    "precision",
    "rng",
    "sending",
    "text",
    "together",
)


def imported_folders(path: Path) -> set[str]:
    """Return the folders of the recipes that a file imports: ``data`` for ``from ..data.images import read_image``."""
    here = path.relative_to(RECIPES).parent.parts if path.is_relative_to(RECIPES) else ()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or "").split(".")
        if node.level:
            parents = len(here) + 1 - node.level  # relative to recipes/; below 0 outside of it
            names = [*here[:parents], *names] if parents >= 0 else []
        elif names[:2] == ["backbone_finetune", "recipes"]:
            names = names[2:]
        else:
            continue
        found.update({names[0]} if names and names[0] else ({alias.name for alias in node.names} if names else ()))
    return found


def test_the_recipes_import_one_way() -> None:
    for path in RECIPES.rglob("*.py"):
        folder = path.relative_to(RECIPES).parts[0].removesuffix(".py")
        if folder == "__init__":
            continue
        above = FOLDERS[: FOLDERS.index(folder)]
        assert imported_folders(path) & set(above) == set(), f"{path.relative_to(RECIPES)} imports from above"
        assert imported_folders(path) <= set(FOLDERS), path
