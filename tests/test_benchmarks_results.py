"""`results.py` and `plots.py`: what was measured comes back from its files, and a file is whole or not there."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from harness import plots, results
from matplotlib.figure import Figure

CPU = torch.device("cpu")


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    report = _report()
    results.write_report(report, tmp_path / "again")
    assert asdict(results.read_report(tmp_path / "again.json")) == asdict(report)


def _report() -> results.Report:
    samples = {"optimizer_ms": [1.0, 1.5] * 3, "step_ms": [40.0, 44.0] * 3}
    unfrozen = results.Row(
        "net", "unfrozen", 2, 8, 32, 900, 2**20, None, 100, [9.0, 9.5] * 3, [20.0, 22.0] * 3, **samples
    )
    rows = [unfrozen, replace(unfrozen, variant="partial", trainable_groups=1, backward_ms=[9.0, 9.9] * 3)]
    rows.append(replace(unfrozen, variant="frozen", trainable_groups=0, backward_ms=[0.002] * 6))
    rows.append(replace(unfrozen, variant="limit", trainable_groups=None, backward_ms=[0.001] * 6))
    report = results.start_report(CPU, "python benchmarks/backward_time.py", {"amp": "off"})
    report.rows, report.noise = rows, [replace(unfrozen, backward_ms=[22.0, 20.0] * 3)]
    return report


def test_ratios_are_taken_pass_by_pass() -> None:
    report = _report()
    frozen, limit = report.row("net", "frozen"), report.row("net", "limit")
    assert frozen is not None
    assert limit is not None
    assert results.ratio_of(frozen, limit, "backward_ms").median == 2.0
    page = results.as_markdown(report)
    # Unfrozen over frozen: 20 and 22 ms over 0.002 ms.
    assert "10,500 [10,000, 11,000]" in page
    assert "| top 1 groups train |" in page


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.write_file(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("result.txt", "old")]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with path.open() as reader:
        results.write_text(path, "new")
        assert reader.read() == "old"  # moved into place beside the old file, not written into it
    assert path.read_text() == "new"


def test_a_scale_is_logarithmic_where_bars_are_far_apart() -> None:
    figure = Figure()
    near, far = figure.subplots(1, 2)
    plots.draw_bars(far, _report(), "net", "backward_ms", "backward")
    plots.draw_bars(near, _report(), "net", "step_ms", "step")
    assert (far.get_yscale(), near.get_yscale()) == ("log", "linear")
