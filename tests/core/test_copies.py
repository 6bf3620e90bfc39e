"""Copies of a network: modules are copied, tensors shared, and no hook of the user runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from backbone_finetune import FineTuneModel
from backbone_finetune.splitting.copies import eval_copy, meta_copy, sharing_copy

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Uncopyable(nn.Module):
    """A network with attributes that `copy.deepcopy` cannot copy: (B, 4) -> (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 2)
        self.lazy = nn.LazyLinear(4)
        self.lock = threading.Lock()
        self.activations = [self.stem(torch.ones(1, 4))]
        self.generator = (number for number in range(3))
        self.layers = {"stem": self.stem}
        self.forward = functools.partial(self.implementation, scale=2.0)

    def implementation(self, x: Tensor, scale: float) -> Tensor:
        with self.lock:
            self.activations.append(self.layers["stem"](x))
        return self.fc(self.lazy(self.activations[-1] * scale))


def test_a_network_without_deepcopy_is_split() -> None:
    network = Uncopyable()
    model = FineTuneModel.from_module(network, network.fc, example_input=INPUTS)
    assert len(network.activations) == 1
    assert network.lazy.has_uninitialized_params()
    logits = model(INPUTS)
    assert torch.equal(logits, network(INPUTS))
    assert torch.equal(model.to_module()(INPUTS), logits)
    assert {id(p) for p in model.parameters()} == {id(p) for p in network.parameters()}


def test_an_eval_copy_runs_its_own_modules() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), Uncopyable())
    network[1].layers["norm"] = network[0]
    twin = eval_copy(network)
    assert twin[1].forward.func.__self__ is twin[1]
    assert twin[1].layers["stem"] is twin[1].stem
    assert twin[1].layers["norm"] is twin[0]
    assert twin[1].stem.weight is network[1].stem.weight
    assert twin[0].running_mean is not network[0].running_mean
    assert twin[1].lock is network[1].lock
    assert twin(INPUTS).shape == (3, 2)
    assert network[1].lazy.has_uninitialized_params()
    assert network[1].training


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


@pytest.mark.parametrize("build", [lambda: nn.LSTM(4, 2), lambda: nn.MultiheadAttention(4, 2), tied])
def test_copies_keep_shared_tensors_shared(build: Callable[[], nn.Module]) -> None:
    network = build()
    names = [name for name, _ in network.named_parameters()]
    for twin in (eval_copy(network), meta_copy(network), sharing_copy(network)):
        assert [name for name, _ in twin.named_parameters()] == names
    assert all(parameter.is_meta for parameter in meta_copy(network).parameters())


def test_an_lstm_runs_on_the_meta_device() -> None:
    outputs, _ = meta_copy(nn.LSTM(4, 2))(torch.empty(5, 3, 4, device="meta"))
    assert outputs.shape == (5, 3, 2)


def test_a_probe_runs_no_hook_of_the_user() -> None:
    fired: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: fired.append(name)

    network: Any = timm.create_model("test_resnet")
    for part in (network, network.layer1, network.fc):
        part.register_forward_pre_hook(note("pre"))
        part.register_forward_hook(note("forward"))
        part.register_full_backward_hook(note("backward"))
    model = FineTuneModel.from_timm(network)
    model.to_module()
    assert model.num_features == 96
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    net[0].register_forward_hook(note("forward"))
    net[1].register_forward_hook(note("forward"))
    cut = FineTuneModel.from_module(net, net[1], example_input=INPUTS)
    assert not fired
    cut(INPUTS)
    assert fired == ["forward", "forward"]


class Quantised(torch.Tensor):
    """Like a quantised weight: a subclass with few operators."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty_like:
            raise NotImplementedError("empty_like")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_weight_of_a_tensor_subclass_has_a_shape_on_the_meta_device() -> None:
    layer = nn.Linear(4, 2)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)
    twin = meta_copy(nn.Sequential(layer))
    assert twin(torch.empty(3, 4, device="meta")).shape == (3, 2)
    assert not twin[0].weight.requires_grad


def test_hooks_that_compute_weights_are_kept() -> None:
    net = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), nn.Linear(4, 2))
    assert torch.equal(eval_copy(net)(INPUTS), net(INPUTS))
    assert FineTuneModel.from_module(net, net[1], example_input=INPUTS)(INPUTS).shape == (3, 2)
