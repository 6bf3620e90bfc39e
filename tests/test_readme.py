"""The READMEs: each Python block runs, the commands are those of CI, and linked files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from backbone_finetune.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BESIDE_CODE = sorted((ROOT / "src").rglob("README.md"))
BLOCKS = [
    block
    for text in (README, *(path.read_text() for path in BESIDE_CODE))
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str) -> None:
    offline = block.replace("pretrained=True", "pretrained=False")
    exec(compile(offline, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) >= 3


def test_commands_install_what_they_need() -> None:
    install = r"^python -m venv \.venv && \. \.venv/bin/activate && pip install (.*) && (.*)$"
    commands = re.findall(install, README, flags=re.MULTILINE)
    assert commands == [("'.[demo]'", "backbone-finetune train"), ("-e '.[test]'", "pytest -n 2")]


def test_commands_are_parsed() -> None:
    block = README[README.index("## On the command line") :].split("```")[1]
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("backbone-finetune ")]
    assert {command[1] for command in commands} == {"train", "predict", "evaluate", "inspect", "export"}
    for _, *arguments in commands:
        build_parser().parse_args(arguments)


@pytest.mark.parametrize("path", [ROOT / "README.md", *BESIDE_CODE], ids=lambda path: path.parent.name)
def test_linked_files_exist(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []
