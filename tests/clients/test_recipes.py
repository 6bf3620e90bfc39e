"""The recipes for other libraries are short, and each has a test file here."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_loops import recipe_code, recipe_titles

pytestmark = pytest.mark.clients


@pytest.mark.parametrize("title", recipe_titles())
def test_a_recipe_is_short_and_is_tested(title: str) -> None:
    assert len([line for line in recipe_code(title).splitlines() if line]) <= 15
    assert any(f'"{title}"' in file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
