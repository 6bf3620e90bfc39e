"""Frozen BatchNorm statistics are restored after weight averaging resets those of every BatchNorm."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from backbone_finetune import FineTuneModel


def model_with_statistics(**keywords: bool) -> FineTuneModel:
    """Build three groups, each with a BatchNorm with other than initial statistics; the last group trains."""
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(3)]
    model = FineTuneModel(nn.Sequential(*blocks), nn.Linear(8, 2), **keywords)
    with torch.no_grad():
        for _ in range(20):
            model(5 * torch.randn(64, 8) + 3)
    return model.freeze_backbone(trainable_groups=1)


LOADER = [(torch.randn(32, 8, generator=torch.Generator().manual_seed(step)),) for step in range(4)]


def expected_statistics(model: FineTuneModel) -> dict[str, Tensor]:
    """Return the statistics of a re-estimation by hand, without frozen modules."""
    twin = copy.deepcopy(model).train()
    norm = twin.backbone[2][1]
    norm.reset_running_stats()
    norm.momentum = None
    with torch.no_grad():
        for (inputs,) in LOADER:
            twin(inputs)
    return {name: buffer.clone() for name, buffer in twin.named_buffers()}


def assert_buffers(model: FineTuneModel, expected: dict[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


def test_update_bn_changes_only_trainable_statistics() -> None:
    model = model_with_statistics()
    expected = expected_statistics(model)
    for _ in range(2):
        with model.assert_frozen():
            update_bn(LOADER, model)
        assert_buffers(model, expected)
        assert [block[1].momentum for block in model.backbone] == [0.1] * 3


def test_update_bn_of_an_averaged_copy() -> None:
    model = model_with_statistics()
    expected = expected_statistics(model)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    frozen = model.frozen_fingerprint()
    update_bn(LOADER, averaged)
    assert_buffers(averaged.module, expected)
    assert averaged.module.frozen_fingerprint() == model.frozen_fingerprint() == frozen


def test_update_bn_of_a_copy_with_a_loaded_state_dict() -> None:
    model = model_with_statistics()
    averaged = AveragedModel(FineTuneModel(copy.deepcopy(model.backbone), nn.Linear(8, 2)).freeze_backbone())
    averaged.module.backbone.load_state_dict(model_with_statistics().backbone.state_dict())
    before = copy.deepcopy(averaged.module.state_dict())
    update_bn(LOADER, averaged)
    after = averaged.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_norm_eval_keeps_all_statistics() -> None:
    model = model_with_statistics(norm_eval=True).unfreeze_backbone()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    update_bn(LOADER, model)
    assert_buffers(model, before)


def reset_as_lightning_does(model: nn.Module) -> list[tuple[nn.BatchNorm1d, float]]:
    """`StochasticWeightAveraging.reset_batch_norm_and_save_state` of Lightning 2."""
    momenta = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean = torch.zeros_like(module.running_mean)
            module.running_var = torch.ones_like(module.running_var)
            momenta.append((module, module.momentum))
            module.momentum = None
            module.num_batches_tracked *= 0
    return momenta


@pytest.mark.parametrize("calls_train", [False, True])
def test_the_reset_of_lightning(calls_train: bool) -> None:
    model = model_with_statistics()
    expected = expected_statistics(model)
    model.train()
    with model.assert_frozen():
        momenta = reset_as_lightning_does(model)
        if calls_train:
            model.train()
        for (inputs,) in LOADER:
            model(inputs)
    for module, momentum in momenta:
        module.momentum = momentum
    assert_buffers(model, expected)


def test_lightning_itself() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, model: FineTuneModel) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[Tensor], position: int) -> Tensor:
            return self.model(batch[0]).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model.param_groups(lr=0.01))

    model = model_with_statistics()
    frozen = model.frozen_fingerprint()
    last = model.backbone[2][1].running_mean.clone()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.cat([inputs for (inputs,) in LOADER]))
    trainer.fit(Module(model), torch.utils.data.DataLoader(data, batch_size=32))
    assert model.frozen_fingerprint() == frozen
    assert not torch.equal(model.backbone[2][1].running_mean, last)


def test_a_reset_by_the_user_is_kept() -> None:
    model = model_with_statistics()
    for block in model.backbone:
        block[1].reset_running_stats()
    model.train()(torch.randn(4, 8))
    model.train()(torch.randn(4, 8))
    assert all(not block[1].running_mean.any() for block in model.backbone[:2])


def test_unfrozen_and_reassembled_networks_have_no_leftover_attributes() -> None:
    model = model_with_statistics()
    assert "reset_running_stats" in vars(model.backbone[0][1])
    model.to_module()
    assert not any("reset_running_stats" in vars(module) for module in model.modules())
    model.freeze_backbone().unfreeze_backbone()
    assert not any("reset_running_stats" in vars(module) for module in model.modules())
    update_bn(LOADER, model)
    assert all(block[1].num_batches_tracked == len(LOADER) for block in model.backbone)


def test_copies_and_pickles_restore_their_own_statistics() -> None:
    model = model_with_statistics()
    frozen = model.frozen_fingerprint()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        update_bn(LOADER, twin)
        assert twin.frozen_fingerprint() == frozen
        twin.backbone[0][1].reset_running_stats()
        assert model.frozen_fingerprint() == frozen


def test_compiled() -> None:
    torch.compiler.reset()
    model = model_with_statistics()
    expected = expected_statistics(model)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(LOADER[0][0])
    with model.assert_frozen():
        update_bn(LOADER, compiled)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, expected[name])


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_by_lerp_keep_frozen_tensors_exact(use_buffers: bool) -> None:
    model = model_with_statistics()
    averages = [
        AveragedModel(model, use_buffers=use_buffers),
        AveragedModel(model, use_buffers=use_buffers, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    ]
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.01, weight_decay=0.1))
    for (inputs,) in LOADER:
        model(inputs).square().sum().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        assert average.module.frozen_fingerprint() == model.frozen_fingerprint()


def test_a_deleted_model_is_freed_at_once_and_copies_reset_their_own_modules() -> None:
    model = model_with_statistics()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.backbone[0][1].reset_running_stats()
        assert not twin.backbone[0][1].running_mean.any()
        assert model.backbone[0][1].running_mean.any()
    parameters = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()  # with a reference cycle, memory would be kept until the next garbage collection
    try:
        del model, twin
        assert [parameter() for parameter in parameters] == [None] * len(parameters)
    finally:
        gc.enable()
