"""from_module: the network is split at the given object, the split is checked, and the network still works."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel


class Net(nn.Module):
    """A network with its classifier at `head.fc`: (B, 6) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(6))
        self.stem = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Sequential(nn.ReLU())
        self.head.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.head.fc(self.head[0](self.norm(self.stem(x + self.token)))))

    def after(self, logits: Tensor) -> Tensor:
        return logits


class LogSoftmax(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=1)


class Reshaped(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits[:, :, None]


class SoftmaxInEvaluation(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits if self.training else logits.softmax(dim=1)


class InPlace(Net):
    def after(self, logits: Tensor) -> Tensor:
        return logits.div_(0.07)


class ByKeyword(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(input=self.stem(x))


class ReadsWeight(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.stem(x).to(self.head.fc.weight.dtype))


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.head.fc(self.stem(x))


class NeverCalled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) @ self.head.fc.weight.T if isinstance(self.head.fc, nn.Linear) else self.stem(x)


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("example_input", [None, INPUTS, (INPUTS,)])
def test_the_split_network_computes_the_same_function(example_input: Any) -> None:
    net = Net()
    twin = copy.deepcopy(net)
    model = FineTuneModel.from_module(net, net.head.fc, example_input=example_input)
    assert model.classifier is net.head.fc
    for mode in (True, False):
        assert torch.equal(model.train(mode)(INPUTS), twin.train(mode)(INPUTS))
    assert model.num_classes == 3


def test_the_given_network_still_works_and_shares_its_parameters() -> None:
    net = Net().eval()
    before = net(INPUTS)
    model = FineTuneModel.from_module(net, net.head.fc, example_input=INPUTS)
    assert torch.equal(net(INPUTS), before)
    assert {id(p) for p in model.parameters()} == {id(p) for p in net.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(net.eval()(INPUTS), model.eval()(INPUTS))


def test_construction_does_not_change_the_network() -> None:
    net = Net()
    state = copy.deepcopy(net.state_dict())
    random_state = torch.get_rng_state()
    FineTuneModel.from_module(net, net.head.fc, example_input=INPUTS)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not net._forward_hooks
    assert not net.head._forward_hooks


def test_a_replacement_for_the_classifier() -> None:
    net = Net()
    fresh = nn.Linear(8, 5)
    model = FineTuneModel.from_module(net, net.head.fc, new_classifier=fresh, example_input=INPUTS)
    assert model.classifier is fresh
    assert model(INPUTS).shape == (4, 5)
    assert net(INPUTS).shape == (4, 3)
    with pytest.raises(ValueError, match=r"from_module: the classifier \(Linear\) cannot take .* \(B, 8\)"):
        FineTuneModel.from_module(net, net.head.fc, new_classifier=nn.Linear(9, 5), example_input=INPUTS)


def test_to_module_has_the_original_names_and_modules() -> None:
    net = Net()
    names = list(net.state_dict())
    model = FineTuneModel.from_module(net, net.head.fc).freeze_backbone()
    plain = model.to_module()
    assert type(plain) is Net
    assert list(plain.state_dict()) == names
    assert not any("cut" in type(module).__name__.lower() for module in plain.modules())
    assert torch.equal(plain.eval()(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("kind", [LogSoftmax, Reshaped, SoftmaxInEvaluation, InPlace, TwoOutputs])
def test_a_network_that_processes_its_logits_raises_at_construction(kind: type[Net]) -> None:
    net = kind()
    with pytest.raises(ValueError, match=r"processes the output of its classifier 'head\.fc' in eval mode"):
        FineTuneModel.from_module(net, net.head.fc, example_input=INPUTS)


@pytest.mark.parametrize("kind", [LogSoftmax, Reshaped, InPlace, TwoOutputs])
@pytest.mark.parametrize("mode", [True, False])
def test_a_network_that_processes_its_logits_raises_in_the_first_forward(kind: type[Net], mode: bool) -> None:
    net = kind()
    model = FineTuneModel.from_module(net, net.head.fc).train(mode)
    for _ in range(2):
        with pytest.raises(ValueError, match="processes the output of its classifier"):
            model(INPUTS)


def test_each_mode_is_checked_separately() -> None:
    net = SoftmaxInEvaluation()
    model = FineTuneModel.from_module(net, net.head.fc)
    model.train()(INPUTS)
    with pytest.raises(ValueError, match="in eval mode"):
        model.eval()(INPUTS)


@pytest.mark.parametrize(("kind", "times"), [(CalledTwice, 2), (NeverCalled, 0)])
def test_a_classifier_that_is_not_called_exactly_once_raises(kind: type[Net], times: int) -> None:
    net = kind()
    with pytest.raises(ValueError, match=rf"calls its classifier 'head\.fc' {times} times"):
        FineTuneModel.from_module(net, net.head.fc)(INPUTS)


def test_in_place_operations_raise_in_inference_mode_too() -> None:
    net = InPlace()
    with torch.inference_mode(), pytest.raises(ValueError, match="an in-place operation"):
        FineTuneModel.from_module(net, net.head.fc)(INPUTS)
    clean = Net()
    with torch.inference_mode():
        FineTuneModel.from_module(clean, clean.head.fc)(INPUTS * float("nan"))


def test_other_uses_of_the_classifier_raise() -> None:
    net = ByKeyword()
    with pytest.raises(ValueError, match="with 0 positional and 1 keyword arguments"):
        FineTuneModel.from_module(net, net.head.fc)(INPUTS)
    reader = ReadsWeight()
    with pytest.raises(AttributeError, match="reads 'weight' of its classifier, which was removed"):
        FineTuneModel.from_module(reader, reader.head.fc)(INPUTS)


def test_features_from_the_backbone_are_not_kept_alive() -> None:
    net = Net()
    model = FineTuneModel.from_module(net, net.head.fc)
    features = model.backbone(INPUTS)
    held = weakref.ref(features)
    del features
    assert held() is None
    assert model(INPUTS).shape == (4, 3)


def test_a_classifier_that_is_missing_or_occurs_twice_raises() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"\(Linear\) is not a submodule of the network \(Net\)"):
        FineTuneModel.from_module(net, nn.Linear(8, 3))
    with pytest.raises(ValueError, match="is the network itself"):
        FineTuneModel.from_module(net, net)
    net.again = net.head.fc
    with pytest.raises(ValueError, match=r"occurs 2 times in the network \(head\.fc, again\)"):
        FineTuneModel.from_module(net, net.head.fc)


def test_two_modules_become_a_sequential() -> None:
    backbone, classifier = nn.Linear(6, 4), nn.Linear(4, 2)
    plain = FineTuneModel(backbone, classifier).to_module()
    assert isinstance(plain, nn.Sequential)
    assert list(plain) == [backbone, classifier]


class Counts(nn.Module):
    """Counts its forwards, also in eval mode: (B, 4) -> (B, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.forwards += 1
        return inputs


def test_a_probe_does_not_change_a_buffer_that_every_forward_writes() -> None:
    network = nn.Sequential(Counts(), nn.Linear(4, 2))
    FineTuneModel.from_module(network, network[1], example_input=torch.zeros(1, 4))
    assert network[0].forwards == 0
    classifier = nn.Sequential(Counts(), nn.Linear(4, 2))
    FineTuneModel.from_module(network, network[1], new_classifier=classifier, example_input=torch.zeros(1, 4))
    assert classifier[0].forwards == 0
