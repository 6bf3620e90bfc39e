"""The core imports only torch and timm; imports between the folders of the recipes go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import backbone_finetune

RECIPES = Path(backbone_finetune.__file__).parent / "recipes"
STEPS = ("import torch, timm", "import backbone_finetune", "from backbone_finetune import cli, recipes")


def modules_after(statements: tuple[str, ...]) -> list[set[str]]:
    """Return the modules that are loaded after each of some statements, which one new process runs in turn."""
    code = "import sys\n" + "".join(f"{statement}\nprint(*sys.modules)\n" for statement in statements)
    # One started process for all: each takes seconds to import torch.
    command = [sys.executable, "-W", "error", "-c", code]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [set(line.split()) for line in printed.splitlines()]


def test_the_core_imports_only_torch_and_timm_and_the_command_line_no_matplotlib() -> None:
    before, core, command_line = modules_after(STEPS)
    beyond = core - before
    assert {name for name in beyond if not name.startswith("backbone_finetune")} == set()
    assert not any(name.startswith(("backbone_finetune.recipes", "backbone_finetune.cli")) for name in beyond)
    assert "backbone_finetune.recipes" in command_line
    assert "matplotlib" not in command_line


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
    "memory",
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
