"""`frontier_zoo.py`: the record of a network, resuming after an interruption, and the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import frontier_zoo
import pytest
import torch
from torch import Tensor, nn
from zoo.frontier_cases import CLASSES, Case, examine
from zoo.frontier_networks import subjects

from backbone_finetune import FineTuneModel

pytestmark = pytest.mark.usefixtures("one_thread")

SOUND = Case(
    family="resnet",
    network="test_resnet",
    side=32,
    groups=5,
    trainable=2,
    kept=("backbone.layer2: 96 x 4 x 4 float32, 6.1 kB per image",),
    bytes_per_image=6144,
    native="154 at 160",
    logits_difference=0.0,
    gradients_difference=0.0,
    state_is_equal=True,
    share_of_step=0.5,
    seconds_to_find=1.0,
)


class RandomFront(nn.Module):
    """A network with frozen layers that cannot be cached."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.back(self.front(images + torch.rand(())))
        return features.mean((2, 3))


def test_the_record_of_a_network_with_a_frontier() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=CLASSES)
    case = examine("resnet", "test_resnet", 32, model, 1)
    assert case.refused is None
    assert case.kept == ("backbone.layer3: 192 x 2 x 2 float32, 3.1 kB per image",)
    assert case.bytes_per_image == 192 * 2 * 2 * 4
    assert case.native == f"{192 * 10 * 10 * 4 / 1000:.0f} at 160"
    assert (case.logits_difference, case.gradients_difference, case.state_is_equal) == (0.0, 0.0, True)
    assert case.trainable == model.trainable_groups == 1
    assert case.groups == len(model.layer_groups)
    assert case.share_of_step is not None
    assert case.share_of_step > 0


def test_the_record_of_a_network_without_a_frontier_has_the_reason() -> None:
    case = examine("own", "random", 8, FineTuneModel(RandomFront(), nn.Linear(4, CLASSES)), 1)
    assert case.refused is not None
    assert "no frozen module depends on the input alone" in case.refused
    assert case.kept == ()
    assert case.share_of_step is None


def test_each_family_occurs_once() -> None:
    keys = [(subject.family, subject.name) for subject in subjects()]
    assert len(keys) == len(set(keys)) > 83
    (subject,) = [subject for subject in subjects() if subject.name == "test_byobnet"]
    model = subject.build()
    assert model(torch.randn(2, 3, subject.side, subject.side)).shape == (2, CLASSES)


def test_an_interrupted_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results" / "page"
    output.parent.mkdir()
    done = replace(SOUND, family="byobnet", network="test_byobnet", kept=("what was done before: 1 kB, per image",))
    log = output.with_suffix(".jsonl")
    log.write_text(json.dumps(vars(done)) + "\n" + '{"family": "byobnet", "netw')
    monkeypatch.setattr(sys, "argv", ["frontier_zoo.py", "test_byobnet", "--output", str(output)])
    frontier_zoo.main()
    page = output.with_suffix(".md").read_text()
    lines = [line for line in page.splitlines() if "test_byobnet |" in line]
    assert sum("what was done before" in line for line in lines) == 1
    assert all("backbone." in line for line in lines if "what was done before" not in line)
    assert not log.exists()


def test_a_truncated_line_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert frontier_zoo.read_cases(log) == {}
    log.write_text(json.dumps(vars(SOUND)) + '\n{"family": "vi')
    assert frontier_zoo.read_cases(log) == {("resnet", "test_resnet", 2): SOUND}
    assert log.read_text() == json.dumps(vars(SOUND)) + "\n"


def test_the_page_counts_valid_and_equal_cases() -> None:
    refused = Case("vit", "test_vit", 32, groups=4, trainable=2, refused="it draws lots")
    rounded = replace(SOUND, trainable=3, logits_difference=2e-7)
    drifted = replace(SOUND, family="torchvision", network="resnet18", state_is_equal=False)
    page = frontier_zoo.as_markdown([SOUND, rounded, refused, drifted], {"torch": "2", "open_clip": None}, ["davit"])
    timm = "timm: 1 of 2 networks have a frontier at both depths; 2 of 3 cases are sound, and 1 of those equal"
    assert timm in page
    assert "other libraries: 1 of 1 networks have a frontier at both depths; 1 of 1 cases are sound, and 0" in page
    assert "- test_vit, 2 of 4: it draws lots" in page
    assert "**Interrupted.** Not examined yet: davit." in page
    assert "open_clip:" not in page
    (line,) = [line for line in page.splitlines() if "2.0e-07" in line]
    assert [cell.strip() for cell in line.strip("|").split("|")][3:] == [
        "3 of 5",
        "backbone.layer2: 96 x 4 x 4 float32",
        "6.1",
        "154 at 160",
        "2.0e-07",
        "equal",
        "equal",
        "0.50",
    ]
    (line,) = [line for line in page.splitlines() if "resnet18" in line]
    assert "differs" in line
