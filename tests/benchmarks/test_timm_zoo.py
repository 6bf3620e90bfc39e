"""The support matrix: decisions, resuming after an interruption, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import timm_zoo
import torch
from torch import Tensor, nn
from zoo import record
from zoo.dependencies import DependencyTrace
from zoo.examination import examine_structure, examine_values
from zoo.summary import as_markdown

from backbone_finetune import FineTuneModel

RESULTS = Path(timm_zoo.__file__).parent / "results" / "timm_zoo"


class Chain(nn.Module):
    """Three layers that run in the order of their names, or the last one first."""

    def __init__(self, *, last_comes_first: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.last_comes_first = last_comes_first

    def forward(self, features: Tensor) -> Tensor:
        layers = (self.c, self.a, self.b) if self.last_comes_first else (self.a, self.b, self.c)
        for layer in layers:
            features = layer(features) + features
        return features


def trace(backbone: nn.Module, features: Tensor) -> DependencyTrace:
    model = FineTuneModel(backbone.to("meta"), nn.Identity())
    with torch.no_grad(), DependencyTrace(model.backbone, model.layer_groups, features) as traced:
        model.backbone(features)
    return traced


def test_a_group_that_runs_after_a_later_one_is_found() -> None:
    features = torch.empty(2, 4, device="meta")
    assert trace(Chain(last_comes_first=False), features).walked_through == set()
    assert trace(Chain(last_comes_first=True), features).walked_through == {(0, 2), (1, 2)}


def test_a_write_into_a_view_counts_for_the_whole_tensor() -> None:
    class WritesInPlace(Chain):
        def forward(self, features: Tensor) -> Tensor:
            table = torch.zeros(2, 4, device=features.device)
            table[:1] = self.c(features[:1])
            return self.a(table)

    assert (0, 2) in trace(WritesInPlace(last_comes_first=True), torch.empty(2, 4, device="meta")).walked_through


def test_dropout_is_random_only_with_a_rate() -> None:
    features = torch.empty(2, 4, device="meta")
    for rate, is_random in ((0.0, False), (0.5, True)):
        backbone = nn.Sequential(nn.Linear(4, 4), nn.Dropout(rate))
        assert bool(trace(backbone, features).random_operators) is is_random


@pytest.mark.parametrize(
    ("name", "kept", "comes_back"),
    [("test_vit", True, True), ("levit_128s", True, False), ("volo_d1_224", False, False)],
)
def test_the_record_of_an_architecture(name: str, kept: bool, comes_back: bool) -> None:
    structure = examine_structure(name, "its family")
    values = examine_values(structure)
    assert structure.refused is None
    assert (values.keep_refused is None) is kept
    assert (values.keep_difference == 0.0) is kept
    assert values.logits_spread > 0
    assert (structure.round_trip_refused is None) is (values.fresh_round_trip == "equal") is comes_back
    assert values.keep_round_trip == ("equal" if kept else None)


def test_an_encoder_is_refused_and_does_not_decide_for_others() -> None:
    structure = examine_structure("gemma4_vit_167m_enc", "gemma4_vit")
    assert "no classifier to take off" in str(structure.refused)
    assert record.decide_kept(structure, {}, []).kept is False


def test_without_values_a_similar_architecture_decides() -> None:
    structure = examine_structure("test_vit", "vision_transformer")
    values = {"test_vit": examine_values(structure)}
    large = replace(structure, name="vit_large")
    alike = ["test_vit", "vit_large"]
    assert record.decide_kept(structure, values, alike).proof == "values"
    kept = record.decide_kept(large, values, alike)
    assert (kept.kept, kept.proof, kept.like) == (True, "structure", "test_vit")
    assert record.decide_kept(large, {}, alike).kept is None
    # Two that lose the same modules and disagree decide nothing for a third.
    values["vit_other"] = replace(values["test_vit"], name="vit_other", keep_refused="differs")
    assert record.decide_kept(large, values, [*alike, "vit_other"]).kept is None


def test_a_truncated_line_is_examined_again(tmp_path: Path) -> None:
    path = tmp_path / "zoo.jsonl"
    structure = examine_structure("test_vit", "vision_transformer")
    record.write_line(path, "structure", structure)
    path.write_text(path.read_text(encoding="utf-8") + '{"kind": "struct', encoding="utf-8")
    assert record.read_lines(path) == ({"test_vit": structure}, {})
    record.write_line(path, "structure", replace(structure, name="another"))
    assert list(record.read_lines(path)[0]) == ["test_vit", "another"]


def test_the_command_writes_the_matrix_and_resumes(tmp_path: Path) -> None:
    started = tmp_path / f"zoo.timm-{timm.__version__}.jsonl"
    done = replace(examine_structure("test_resnet", "resnet"), width=1, parameters=10**9)
    record.write_line(started, "structure", done)
    command = [sys.executable, timm_zoo.__file__, "test_resnet", "test_vit", "gemma4_vit_167m_enc"]
    subprocess.run([*command, "--output", str(tmp_path / "zoo")], check=True, capture_output=True)
    matrix = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in matrix["architectures"]}
    assert rows["test_resnet"]["width"] == 1, "what was done is taken as it stands"
    assert rows["test_vit"]["layer_groups"] == ["stem", *(f"blocks.{i}" for i in range(6))]
    assert rows["test_vit"]["kept"] is rows["test_resnet"]["kept"] is True
    assert "no classifier to take off" in rows["gemma4_vit_167m_enc"]["refused"]
    assert matrix["environment"]["timm"] == timm.__version__
    summary = (tmp_path / "zoo.md").read_text(encoding="utf-8")
    assert "**2** of 3 architectures" in summary
    assert "| vision_transformer | 1 | 1 | 1 |" in summary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo.json", "zoo.md"]
    assert str(tmp_path.parent) not in json.dumps(matrix["architectures"])


def test_the_page_is_the_summary_of_the_matrix_and_readme_quotes_it() -> None:
    matrix = json.loads(RESULTS.with_suffix(".json").read_text(encoding="utf-8"))
    page = as_markdown(matrix["architectures"], matrix["environment"])
    assert page == RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    readme = " ".join((RESULTS.parents[1] / "README.md").read_text(encoding="utf-8").split())
    for of_page, of_readme in (
        ("for **1260** with a fresh linear classifier", "1260 go back"),
        ("The other 104 have more", "The other 104 have more than a linear layer"),
        ("**66** of them keep their own", "66 of them go back with their own"),
        ("**38** (crossvit 11, volo 11, efficientvim 8, deit 4, pit 4) can't", "the 38 of the families that can't"),
        (
            "trains 1.2% (convnext_large_mlp) to 95.7% (nest_base_jx)",
            "trains 1.2 % to 95.7 % of the backbone, 31 % in the middle",
        ),
    ):
        assert of_page in page
        assert of_readme in readme


@pytest.mark.parametrize("name", ["convnext_atto", "samvit_base_patch16_224", "test_vit"])
def test_the_share_of_the_last_group_is_recorded(name: str) -> None:
    structure = examine_structure(name, "its family")
    with torch.device("meta"):
        model = FineTuneModel.from_timm(name, num_classes=7).freeze_backbone(trainable_groups=1)
    every = list(model.backbone.parameters())
    trained = sum(parameter.numel() for parameter in every if parameter.requires_grad)
    assert structure.last_group_share == trained / sum(parameter.numel() for parameter in every)
    row = record.as_row(structure, None, record.decide_kept(structure, {}, []))
    assert f"trains {structure.last_group_share:.1%} ({name}) to" in as_markdown([row], defaultdict(str))
