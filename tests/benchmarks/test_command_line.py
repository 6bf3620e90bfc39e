"""The common options of the benchmarks, which take effect before the first measurement."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import backward_time
import feature_cache
import peers
import pytest
import targets
import torch
import wrapper_overhead
from harness import options

pytestmark = pytest.mark.usefixtures("one_thread")


def _options(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_shared_options(parser, output=str(tmp_path))
    options.add_models_option(parser, ["resnet18"])
    return parser.parse_args(["--device", "cpu", *arguments])


def test_the_number_of_threads_is_set(tmp_path: Path) -> None:
    options.settle_device(_options(tmp_path, "--threads", "2"))
    assert torch.get_num_threads() == 2
    options.settle_device(_options(tmp_path))
    assert torch.get_num_threads() == 2  # unchanged


def test_cudnn_chooses_its_algorithms_during_warm_up(tmp_path: Path) -> None:
    torch.backends.cudnn.benchmark = False
    options.settle_device(_options(tmp_path))
    assert torch.backends.cudnn.benchmark


def test_a_model_named_twice_is_measured_once(tmp_path: Path) -> None:
    assert _options(tmp_path, "--models", "b", "a", "b").models == ["b", "a"]
    assert _options(tmp_path).models == ["resnet18"]


@pytest.mark.parametrize(
    "main", [backward_time.main, feature_cache.main, peers.main, targets.main, wrapper_overhead.main]
)
def test_a_read_only_folder_is_an_error_before_any_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cpu", "--output", str(file / "folder")])
    assert f"--output {file}/folder: Not a directory; pass a folder that can be written." in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which not even root can write")
def test_an_existing_folder_without_write_permission_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--output /proc/self: .*; pass a folder that can be written"):
        options.settle_device(_options(tmp_path, "--output", "/proc/self"))


def test_the_check_of_the_folder_leaves_no_file(tmp_path: Path) -> None:
    options.settle_device(_options(tmp_path, "--output", str(tmp_path / "new" / "folder")))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["new", "new/folder"]


@pytest.mark.parametrize(("device", "expected"), [("cpu", 8), ("cuda", 256)])
def test_the_default_batch_size_depends_on_the_device(tmp_path: Path, device: str, expected: int) -> None:
    assert options.batch_size_on(torch.device(device), _options(tmp_path)) == expected
    assert options.batch_size_on(torch.device(device), _options(tmp_path, "--batch-size", "3")) == 3


def test_readme_links_and_scripts_exist() -> None:
    folder = Path(backward_time.__file__).parent
    page = (folder / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page)
    scripts = re.findall(r"python (benchmarks/\S+\.py)", page)
    assert len(links) > 5
    assert len(set(scripts)) > 6
    assert [link for link in links if not (folder / link).exists()] == []
    assert [script for script in scripts if not (folder.parent / script).exists()] == []
