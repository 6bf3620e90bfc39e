"""Checksums that stand for a comparison of frozen tensors on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbone_finetune import FineTuneModel, verification
from backbone_finetune.tensors import checksums

VALUES = torch.randn(101, 3, generator=torch.Generator().manual_seed(0))
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def of(tensor: Tensor) -> str:
    return checksums.checksums({"it": tensor})["it"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_change_of_a_bit_changes_the_checksum(dtype: torch.dtype, device: torch.device) -> None:
    on_cpu = (VALUES * 100).abs().to(dtype)
    tensor = on_cpu.to(device)
    before = of(tensor)
    octets = tensor.view(torch.uint8)
    for place in (0, 1, 77, octets.numel() - 1):
        changed = tensor.clone()
        changed.view(torch.uint8).view(-1)[place] ^= 1
        assert of(changed) != before
    assert of(tensor.clone()) == of(on_cpu) == before
    assert of(tensor.flip(0)) != before or dtype == torch.bool


def test_small_changes_of_many_numbers_change_the_checksum(device: torch.device) -> None:
    seen = {of(VALUES)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        changed = VALUES.clone()
        changed.view(torch.int32).add_(torch.randint(-1, 2, VALUES.shape, generator=generator, dtype=torch.int32))
        seen.add(of(changed.to(device)))
    assert len(seen) == 301


def test_the_checksum_is_of_all_chunks(device: torch.device) -> None:
    octets = torch.zeros(2**22 + 2, dtype=torch.uint8, device=device)  # two elements more than are summed at once
    seen = {of(octets)}
    for place in (1, 2**22 + 1):
        changed = octets.clone()
        changed[place] = 1
        seen.add(of(changed))
    assert len(seen) == 3


def test_the_checksum_does_not_depend_on_the_layout(device: torch.device) -> None:
    images = torch.randn(2, 3, 4, 5)
    tensors = [VALUES, VALUES.bfloat16()[:, 1:], VALUES.t(), torch.tensor(3.0), torch.zeros(0), VALUES.to_sparse()]
    tensors += [torch.complex(VALUES, VALUES).conj(), images.contiguous(memory_format=torch.channels_last)]
    tensors = [tensor.to(device) for tensor in tensors]
    whole = [of(tensor) for tensor in tensors]
    assert len(set(whole)) == len(whole)
    assert whole[-1] == of(images)
    assert of(VALUES) != of(VALUES.reshape(-1))


def test_only_cuda_tensors_have_checksums() -> None:
    with FakeTensorMode():
        assert [checksums.has_checksum(torch.zeros(2, device=device)) for device in ("cuda", "cpu")] == [True, False]


def test_frozen_tensors_are_compared_by_checksums_where_they_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "has_checksum", lambda tensor: True)
    monkeypatch.setattr(verification, "digest", lambda tensor: pytest.fail("a tensor was sent to the host"))
    model = FineTuneModel(nn.Linear(4, 3), nn.Linear(3, 2)).freeze_backbone()
    with model.assert_frozen():
        # As if the model moved to the CPU: both values of a tensor are of one kind.
        monkeypatch.setattr(verification, "has_checksum", lambda tensor: False)
    monkeypatch.setattr(verification, "has_checksum", lambda tensor: True)
    with pytest.raises(AssertionError, match=r"1 of 2 frozen tensors changed.\n.*backbone\.bias"):
        change_a_bit(model)


def test_a_frozen_tensor_that_changes_on_its_device_raises(device: torch.device) -> None:
    model = FineTuneModel(nn.Linear(4, 3), nn.Linear(3, 2)).freeze_backbone().to(device)
    with model.assert_frozen():
        model.cpu().to(device)
    with pytest.raises(AssertionError, match=r"1 of 2 frozen tensors changed.\n.*backbone\.bias"):
        change_a_bit(model)


def change_a_bit(model: FineTuneModel) -> None:
    with model.assert_frozen(), torch.no_grad():
        model.backbone.bias.view(torch.int32)[0] ^= 1
