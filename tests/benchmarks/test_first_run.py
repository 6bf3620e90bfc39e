"""`cuda_first_run.py`: all parts run, measurements are kept, and failures have a reason."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cuda_first_run
import feature_cache
import pytest
from caching import size
from first_run import parts, predictions

from backbone_finetune import cli

pytestmark = pytest.mark.usefixtures("one_thread")


def _run(
    folder: Path,
    *arguments: str,
    listed: Sequence[parts.Part] | None = None,
    runner: cuda_first_run.Runner | None = None,
) -> int:
    given = ["--device", "cpu", "--output", str(folder), *arguments]
    return cuda_first_run.main(given, listed=listed, runner=runner)


def _saved(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "first_run.json").read_text())
    return content


class _InThisProcess:
    """Runs each part in this process, where torch is loaded already; except the tests, which cannot run themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.monkeypatch = monkeypatch

    def __call__(self, command: Sequence[str], log: Path, seconds: float) -> int:
        self.ran.append(log.stem)
        log.write_text("ran\n")
        self.monkeypatch.chdir(cuda_first_run.REPOSITORY)
        if command[:2] == ("-m", "backbone_finetune.cli"):
            return _exit_status(cli.main, command[2:])
        if command[0] == "-m":
            return 0
        main = importlib.import_module(Path(command[0]).stem).main
        if main is feature_cache.main:
            main = partial(main, judge=partial(size.judge_memory, 40, 80, build=size.build))
        return _exit_status(main, command[1:])


def _exit_status(main: Callable[[list[str]], int | None], arguments: Sequence[str]) -> int:
    try:
        return main(list(arguments)) or 0
    except SystemExit as end:
        return int(end.code or 0)


def test_all_parts_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _InThisProcess(monkeypatch)
    assert _run(tmp_path, runner=runner) == 0, _saved(tmp_path)["parts"]
    saved = _saved(tmp_path)
    assert {part["status"] for part in saved["parts"]} == {"done"}
    on_a_card_alone = ("peak GB", "kernels", "bf16 and channels last")  # the last one needs bf16 instructions
    missing = [line["what"] for line in saved["predictions"] if line["measured"] is None]
    assert not [what for what in missing if not any(name in what for name in on_a_card_alone)]
    assert saved["settings"] == {"minutes": 40.0}, "README says so"
    page = (tmp_path / "first_run.md").read_text()
    assert "backward_float32: frozen, backward ms" in page
    assert "as predicted" not in page  # predictions are for a GPU
    assert _run(tmp_path, runner=runner) == 0
    assert len(runner.ran) == len(saved["parts"]), "finished parts do not run again"


def test_a_gpu_gets_full_sizes_and_a_separate_folder() -> None:
    listed = parts.list_parts(on_cuda=True, folder="benchmarks/results/card")
    assert [part.name for part in listed] == [part.name for part in parts.list_parts(on_cuda=False, folder="x")]
    assert all("cuda" in part.command and "test_resnet" not in part.command for part in listed)
    folders = [part.command[-1] for part in listed if part.result]
    assert len(set(folders)) == len(folders)
    folder = cuda_first_run.default_folder({"device_name": "NVIDIA H100 80GB HBM3"})
    assert folder == cuda_first_run.REPOSITORY / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"


def _part(name: str, code: str, *, minutes: float = 1.0, result: str | None = "some.json") -> parts.Part:
    return parts.Part(name, ("-S", "-c", code), minutes, result)


def test_a_part_that_fails_has_a_reason_and_the_next_parts_run(tmp_path: Path) -> None:
    listed = [
        _part("crashes", "print('so far'); raise RuntimeError('no kernel image')"),
        _part("misses", "print('missed'); raise SystemExit(1)"),
        _part("fails", "print('1 failed'); raise SystemExit(1)", result=None),
        _part("dies", "import os; print('dying', flush=True); os.abort()"),
        _part("works", "print('fine')"),
    ]
    assert _run(tmp_path, listed=listed) == 1
    became = {part["name"]: (part["status"], part["said"]) for part in _saved(tmp_path)["parts"]}
    assert became == {
        "crashes": ("failed", "RuntimeError: no kernel image"),
        "misses": ("done", "missed"),
        "fails": ("failed", "1 failed"),
        "dies": ("failed", "dying"),
        "works": ("done", "fine"),
    }
    assert "RuntimeError: no kernel image" in (tmp_path / "first_run.md").read_text()
    assert "so far" in (tmp_path / "crashes.log").read_text()


def test_the_same_command_again_runs_missing_and_changed_parts(tmp_path: Path) -> None:
    write = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    listed = [_part("works", f"{write}('w')"), _part("fails", f"{write}('f'); 1 / 0")]
    assert _run(tmp_path, listed=listed) == _run(tmp_path, listed=listed) == 1
    assert (tmp_path / "ran").read_text() == "wff"
    listed = [_part("works", f"{write}('n')"), _part("fails", f"{write}('g')")]
    assert _run(tmp_path, listed=listed) == 0
    assert (tmp_path / "ran").read_text() == "wffng"


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["a terminal", "nohup"])
def _inherited(request: pytest.FixtureRequest) -> Iterator[None]:
    """The handling of SIGINT that the script was started with."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_inherited")
def test_a_part_that_takes_too_long_is_stopped_and_can_save(tmp_path: Path) -> None:
    saving = "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('saved')"
    slow = _part("slow", f"import time\n{saving}", minutes=5 / 60)
    assert _run(tmp_path, listed=[slow, _part("after", "print('fine')")]) == 1
    stopped, after = _saved(tmp_path)["parts"]
    assert (stopped["status"], stopped["said"]) == ("stopped", "not done after 5 s; its last line: saved")
    assert after["status"] == "done"


def test_a_part_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    deaf = "import os, signal, time; signal.signal(2, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    runner = partial(cuda_first_run.run_command, seconds_to_save=0.1)
    assert _run(tmp_path, listed=[_part("deaf", deaf, minutes=1 / 60)], runner=runner) == 1
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(int((tmp_path / "deaf.log").read_text()), 0)


def test_the_time_limit_of_all_parts(tmp_path: Path) -> None:
    assert _run(tmp_path, "--minutes", "0", listed=[_part("first", "print('fine')")]) == 1
    (first,) = _saved(tmp_path)["parts"]
    assert first["status"] == "not run"
    assert "the same command again goes on here" in first["said"]


def test_an_interrupt_keeps_earlier_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(command: Sequence[str], log: Path, seconds: float) -> int | None:
        if log.stem == "second":
            raise KeyboardInterrupt
        return cuda_first_run.run_command(command, log, seconds)

    listed = [_part("first", "print('fine')"), _part("second", "print('never')")]
    assert _run(tmp_path, listed=listed, runner=interrupted) == 130
    assert [part["name"] for part in _saved(tmp_path)["parts"]] == ["first"]
    assert f"interrupted: what was measured until then is in {tmp_path}" in capsys.readouterr().err


_ASKED = {
    "frozen, backward ms": 0.15,
    "frozen, peak GB": 0.8,
    "frozen, kernels of a backward, ms": 0.02,
    "step, frozen / unfrozen": 0.25,
    "A/A of the frozen backward, distance from 1": None,
}


def test_each_prediction_finds_its_measurement() -> None:
    frozen = {"model": "resnet50", "variant": "frozen", "backward_ms": [0.1, 0.2, 0.15], "peak_bytes": 8 * 10**8}
    frozen |= {"step_ms": [10.0], "backward_device_ms": 0.02}
    unfrozen = frozen | {"variant": "unfrozen", "step_ms": [40.0]}
    content = {"rows": [unfrozen, frozen, frozen | {"model": "another", "peak_bytes": 1}], "noise": []}
    predicted = {line.what: line for line in predictions.list_predictions() if line.part == "backward_float32"}
    assert {what: predicted[what].read(content) for what in _ASKED} == _ASKED


def test_a_gpu_is_compared_with_the_predictions() -> None:
    lines = [cuda_first_run.Comparison("part", "what", 1.0, 2.0, measured) for measured in (1.5, 2.5, None)]
    run = cuda_first_run.FirstRun({"device_name": "NVIDIA H100 80GB HBM3"}, "python", predictions=lines)
    page = [line for line in cuda_first_run.as_markdown(run).splitlines() if line.startswith("| part: ")]
    assert [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in page] == [
        ["1.5", "as predicted"],
        ["2.5", "otherwise"],
        ["", ""],
    ]
