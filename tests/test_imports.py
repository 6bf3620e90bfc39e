"""The core stands on torch and timm alone, and loads nothing that they do not."""

from __future__ import annotations

import subprocess
import sys

LIST_MODULES = "import sys; {}; print('\\n'.join(sorted(sys.modules)))"


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-W", "error", "-c", LIST_MODULES.format(statement)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_core_loads_nothing_that_torch_and_timm_do_not() -> None:
    beyond = modules_after("import backbone_finetune") - modules_after("import torch, timm")
    assert {name for name in beyond if not name.startswith("backbone_finetune")} == set()
    assert not any(name.startswith(("backbone_finetune.recipes", "backbone_finetune.cli")) for name in beyond)
