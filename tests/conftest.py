"""Shared by every test: the same seed, and few threads, so that runs agree and neighbours are left alone."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
