"""Training on another device than the CPU, as far as it can be tested without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from backbone_finetune.recipes import TrainerConfig, evaluate, make_accelerator

CPU = torch.device("cpu")


class Small(nn.Linear):
    """A network on a device with memory for ``most`` images."""

    most = 100

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


def test_an_evaluation_without_memory_for_a_batch_runs_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    data: Any = TensorDataset(torch.randn(13, 4), torch.arange(13) % 2)
    network, config = Small(4, 2), TrainerConfig(make_accelerator(CPU), batch_size=8, show_progress=False)
    whole = evaluate(network, data, config)
    network.most = 3
    in_parts = evaluate(network, data, config)
    assert torch.equal(in_parts.answers, whole.answers)
    assert in_parts.loss == pytest.approx(whole.loss)
    assert caplog.messages == [
        f"out of memory: the model runs on {size} images at a time from here on" for size in (4, 2)
    ]
    network.most = 0
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        evaluate(network, data, config)
