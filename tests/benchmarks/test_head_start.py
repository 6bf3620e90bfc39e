"""`head_start.py`: each way trains as its name says, and a small run writes a page and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import head_start
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

pytestmark = [pytest.mark.benchmarks, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("arm", head_start.ARMS)
def test_each_way_trains(arm: str) -> None:
    targets = torch.arange(40) % 10
    data = TensorDataset(torch.eye(10)[targets] * 3 + torch.randn(40, 10) / 10, targets)
    head = nn.Linear(10, 10)
    before = head.weight.detach().clone()
    model = head_start.train_head(arm, head, data, seed=0)
    assert model.classifier is head
    assert not torch.equal(head.weight, before)


def test_a_small_run_writes_a_page_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--splits", "1", "--image-size", "32", "--sets", "clipart", "--output", str(tmp_path / "heads")]
    command += ["--arms", "default", "0.001"]
    assert head_start.main(command) == 0
    assert "clipart 0: default" in capsys.readouterr().out
    assert "| default / 0.001 " in (tmp_path / "heads.md").read_text()
    outcomes = json.loads((tmp_path / "heads.json").read_text())["outcomes"]
    assert [outcome["arm"] for outcome in outcomes] == ["default", "0.001"]
    assert head_start.main(command) == 0
    assert capsys.readouterr().out == ""
