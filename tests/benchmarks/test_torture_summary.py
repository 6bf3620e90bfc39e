"""The summary page of the torture test: counts, failures, and invalid reports."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torture_summary

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" time="90.0" timestamp="2026-11-24T04:00:00.000000+00:00">
<testcase name="test_the_default_cases_cover_all_conditions" time="1" />
<testcase name="test_every_family_under_every_condition[efficientnet_v2-adamw-none-plain]" time="1" />
<testcase name="test_every_family_under_every_condition[efficientnet_v2-adamw-zeros-plain]" time="1" />
<testcase name="test_every_family_under_every_condition[vit-adamw-none-plain]" time="1" />
<testcase name="test_every_family_under_every_condition[vit-adamw-none-checkpointing]" time="1">
<skipped type="pytest.skip" message="has no gradient checkpointing">more</skipped></testcase>
<testcase name="test_every_family_under_every_condition[vit-adamw-zeros-checkpointing]" time="1">
<skipped type="pytest.skip" message="has no gradient checkpointing">more</skipped></testcase>
<testcase name="test_every_family_under_every_condition[vit-adamw-zeros-plain]" time="1">{}</testcase>
</testsuite></testsuites>
"""
FAILURE = '<failure message="AssertionError: 3 frozen tensors moved">a trace</failure>'


def summarise(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    report, page = folder / "torture.xml", folder / "torture.md"
    report.write_text(text)
    monkeypatch.setattr(sys, "argv", [torture_summary.__file__, str(report), "--output", str(page)])
    return torture_summary.main(), page


def test_counts_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, page = summarise(REPORT.format(""), tmp_path, monkeypatch)
    assert status == 0
    text = page.read_text()
    assert "**4** of 6 cases passed, 0 failed, 2 skipped: 2 families" in text
    assert "skipped: has no gradient checkpointing: 2 cases: vit (checkpointing)" in text
    assert "| efficientnet_v2 | 2 of 2 |  |" in text
    assert "| vit | 2 of 2 | skipped |" in text
    assert "ended 2026-11-24T04:01:30+00:00, 2 minutes" in text


def test_a_failure_is_listed_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, page = summarise(REPORT.format(FAILURE), tmp_path, monkeypatch)
    assert status == 1
    assert "- failed: AssertionError: 3 frozen tensors moved: 1 case: vit (plain)" in page.read_text()
    assert "| vit | 1 of 2 | skipped |" in page.read_text()


@pytest.mark.parametrize(
    "text", ["no xml", "<testsuites><testsuite time='1' timestamp='2026-11-24T04:00:00'/></testsuites>"]
)
def test_a_report_of_other_tests_raises(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        summarise(text, tmp_path, monkeypatch)
    assert "pass what `pytest -m slow" in capsys.readouterr().err
    assert not (tmp_path / "torture.md").exists()
