"""`results.py` and `plots.py`: reports round-trip through files, and writes are atomic."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from harness import plots, results
from matplotlib.figure import Figure

CPU = torch.device("cpu")


def test_a_report_round_trips(tmp_path: Path) -> None:
    report = _report()
    results.write_report(report, tmp_path / "again")
    assert asdict(results.read_report(tmp_path / "again.json")) == asdict(report)


def test_a_report_without_kernel_counts_can_be_read() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "cpu-2-cores" / "backward_time.json"
    report = results.read_report(path)
    assert len(report.rows) > 20
    assert all(row.step_ms and not row.loop_ms and row.backward_kernels is None for row in report.rows)
    assert "back to back" not in results.as_markdown(report)


def _on_a_gpu() -> results.Report:
    """Return rows as from a GPU: a frozen backward with kernels of 20 µs that take 150 µs to launch."""
    report = _report()
    for row in report.rows:
        row.loop_ms = [39.0, 41.0] * 3
        row.backward_host_ms, row.step_host_ms = [0.0002] * 6, [20.0] * 6
        row.backward_kernels, row.backward_device_ms, row.step_kernels, row.step_device_ms = 300, 20.0, 900, 38.0
        row.peak_before_bytes, row.peak_bytes, row.peak_reserved_bytes = 2**20, 3 * 2**20, 4 * 2**20
        row.allocation_retries = 0
    frozen = report.row("net", "frozen")
    assert frozen is not None
    frozen.backward_ms, frozen.backward_device_ms, frozen.backward_kernels = [0.15] * 6, 0.02, 6
    frozen.backward_host_ms = [0.14] * 6
    report.settings |= {"precision": "bf16 autocast", "channels_last": True}
    return report


def test_a_row_that_waits_for_the_host_is_launch_bound(tmp_path: Path) -> None:
    report = _on_a_gpu()
    assert {row.variant: row.launch_bound for row in report.rows} == {
        "unfrozen": [],
        "partial": [],
        "frozen": ["backward"],
        "limit": [],
    }
    page = results.as_markdown(report)
    assert "## net, batch 8 of 32 pixels, bf16 autocast, channels last" in page
    (line,) = [
        line for line in page.splitlines() if line.startswith("| frozen") and "launch" not in line and "0.02" in line
    ]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["frozen", "40 ± 2", "1.000 [1.000, 1.000]", "6", "0.02", "38", "backward", "1", "3", "4"]
    results.write_report(report, tmp_path / "again")
    assert asdict(results.read_report(tmp_path / "again.json")) == asdict(report)
    header, first, *_ = (tmp_path / "again.csv").read_text().splitlines()
    written = dict(zip(header.split(","), first.split(","), strict=True))
    assert (written["loop_ms_median"], written["backward_device_ms"]) == ("40", "20.0")


def test_allocation_retries_during_timing_are_reported() -> None:
    report = _on_a_gpu()
    assert "freed its cache" not in results.as_markdown(report)
    report.rows[0].allocation_retries = 2
    assert "The allocator freed its cache 2 times while this was timed" in results.as_markdown(report)


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


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        results.write_file(path, fail)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("result.txt", "old")]


def test_a_reader_never_reads_an_incomplete_file(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")
    with path.open() as reader:
        results.write_text(path, "new")
        assert reader.read() == "old"  # renamed over the old file, not written into it
    assert path.read_text() == "new"


def test_a_scale_is_logarithmic_for_very_different_bars() -> None:
    figure = Figure()
    near, far = figure.subplots(1, 2)
    plots.draw_bars(far, _report(), "net", "backward_ms", "backward")
    plots.draw_bars(near, _report(), "net", "step_ms", "step")
    assert (far.get_yscale(), near.get_yscale()) == ("log", "linear")


def test_kernel_times_are_marked_on_the_bars_of_a_gpu() -> None:
    figure = Figure()
    gpu, cpu = figure.subplots(1, 2)
    for axes, report in ((gpu, _on_a_gpu()), (cpu, _report())):
        plots.draw_bars(axes, report, "net", "backward_ms", "backward")
        plots.draw_device_times(axes, report, "net")
    (kernels,) = [line for line in gpu.get_lines() if line.get_label() == "kernels alone"]
    assert list(kernels.get_ydata()) == [20.0, 20.0, 0.02]
    assert gpu.get_ylim()[0] < 0.02
    assert [line.get_label() for line in cpu.get_lines() if line.get_label() == "kernels alone"] == []
