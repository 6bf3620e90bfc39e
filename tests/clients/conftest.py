"""The libraries take seconds to import, so these tests are collected only with the marker `clients`."""

from __future__ import annotations

import os

import pytest
from torch.utils.data import TensorDataset


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    if "not clients" in config.option.markexpr:
        return True
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
    return None


@pytest.fixture
def images() -> TensorDataset:
    from client_loops import small_images  # noqa: PLC0415  # only if a test of this folder runs

    return small_images()
