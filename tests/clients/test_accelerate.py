"""accelerate: one `prepare` per phase, on one and two processes, and resuming from its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from client_loops import (
    BATCH_SIZE,
    DEEPEST,
    TORCHRUN,
    assert_equal,
    groups_at,
    recipe,
    run_two_processes,
    small_model,
    train_plainly,
)
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")
from accelerate import Accelerator
from client_accelerate import make_adamw

pytestmark = [pytest.mark.clients, pytest.mark.usefixtures("one_thread")]


def test_groups_by_epoch_equal_a_plain_loop(images: TensorDataset, tmp_path: Path) -> None:
    model, plain = small_model(), small_model()
    loader = DataLoader(images, BATCH_SIZE)
    with model.freeze_backbone(trainable_groups=DEEPEST).assert_frozen():
        names = recipe("accelerate", model=model, loader=loader, groups_at=groups_at)
    train_plainly(plain, images, groups_at, optimizer=make_adamw(plain))
    assert_equal(model.state_dict(), plain.state_dict())
    names["accelerator"].save_model(names["network"], tmp_path)
    again = small_model()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(again.eval()(images.tensors[0]), plain(images.tensors[0]))


def test_a_run_resumes_from_its_folder(images: TensorDataset, tmp_path: Path) -> None:
    model = small_model()
    names = recipe("accelerate", model=model, loader=DataLoader(images, BATCH_SIZE), groups_at=groups_at)
    names["accelerator"].save_state(str(tmp_path / "state"))
    train_plainly(model, images, lambda epoch: 3, optimizer=names["optimizer"], epochs=1)

    resumed = small_model().freeze_backbone(trainable_groups=3)
    optimizer, accelerator = make_adamw(resumed), Accelerator()
    accelerator.prepare(resumed, optimizer)
    with resumed.assert_frozen():
        accelerator.load_state(str(tmp_path / "state"))
        train_plainly(resumed, images, lambda epoch: 3, optimizer=optimizer, epochs=1)
    assert_equal(resumed.state_dict(), model.state_dict())


def test_groups_by_epoch_on_two_processes(tmp_path: Path) -> None:
    run_two_processes("client_accelerate.py", tmp_path / "log", *TORCHRUN)
