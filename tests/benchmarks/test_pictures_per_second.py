"""The benchmark of reading images: a small run, its limit, and failures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pictures_per_second
import pytest
import torch
from reading import stages
from reading.folder import make_folder
from reading.one_pass import run_once


def test_a_pass_over_a_folder_of_ten_classes_gives_a_feature_per_image(tmp_path: Path) -> None:
    make_folder(tmp_path, 12, distinct=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"class {number}" for number in range(10)]
    assert sum(map(len, run_once(tmp_path, "test_resnet", batch_size=5))) == 12


def test_a_small_run_writes_its_samples_and_ratios(tmp_path: Path) -> None:
    arguments = ["--model", "test_resnet", "--pictures", "20", "--repeats", "2", "--threads", "1"]
    status = pictures_per_second.main(
        [*arguments, "--output", str(tmp_path)],
        runner=lambda command, threads: (2.0, 1.0),
        openvino=lambda model: (1.0, 4.0, 5.0),
    )
    assert status == 0
    written = json.loads((tmp_path / "pictures_per_second.json").read_text())
    assert {len(samples) for samples in written["cpu_seconds"].values()} == {2}
    assert [target["ratio"]["median"] for target in written["targets"]] == [1.0, 1.0, 0.5]
    page = (tmp_path / "pictures_per_second.md").read_text()
    assert "| one pass by hand " in page
    assert "| read and decode " in page


def test_a_command_that_fails_raises() -> None:
    with pytest.raises(RuntimeError, match=r"exit\(3\) ended with 3"):
        pictures_per_second.run([sys.executable, "-c", "exit(3)"], threads=1)
    cpu, wall = pictures_per_second.run([sys.executable, "-c", "sum(range(10**6))"], threads=1)
    assert cpu > 0
    assert wall > 0


def test_compiled_passes_are_timed_if_openvino_is_installed() -> None:
    compiled_modules = []

    def compile_plainly(module: torch.nn.Module) -> Any:
        compiled_modules.append(module)
        return module.forward

    times = stages.time_openvino("test_resnet", batches=2, batch_size=2, compiler=compile_plainly)
    assert times is not None
    assert min(times[:2]) > 0
    assert len(compiled_modules) == 2  # whether it is installed, and once for all batches

    def fail(module: object) -> Any:
        raise ModuleNotFoundError("openvino is not installed")

    assert stages.time_openvino("test_resnet", compiler=fail) is None
