"""`torch.compile` while freezing and unfreezing: correct numbers, no state compiled twice, no graph break."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from backbone_finetune import FineTuneModel


class Convolutions(nn.Module):
    """A CNN of three layer groups, small enough for a real compiler: (B, 3, H, W) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        # No biases: before a BatchNorm their gradient is rounding noise, which compilers round differently.
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.top = nn.Sequential(
            nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.fc = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.top(self.middle(self.stem(images))).flatten(1))


def from_module(example_input: Tensor | None) -> FineTuneModel:
    network = Convolutions()
    return FineTuneModel.from_module(network, network.fc, example_input=example_input)


def from_timm(name: str) -> FineTuneModel:
    return FineTuneModel.from_timm(name, num_classes=10, img_size=64)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
needs_a_c_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ here, with g++")


def step(compiled: Callable[[Tensor], Tensor], model: FineTuneModel) -> None:
    """Compare a forward and backward of the compiled model with an eager copy."""
    eager = copy.deepcopy(model)
    outputs, expected = compiled(IMAGES), eager(IMAGES)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    outputs.square().sum().backward()
    expected.square().sum().backward()
    theirs = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, buffer), expected_buffer in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected_buffer, rtol=1e-4, atol=1e-5, msg=name)
    model.zero_grad()


@pytest.mark.parametrize(
    ("build", "backend"),
    [
        pytest.param(
            lambda: from_module(IMAGES), "inductor", marks=[needs_a_c_compiler, pytest.mark.long], id="cnn-inductor"
        ),
        pytest.param(lambda: from_module(None), "aot_eager", marks=pytest.mark.long, id="cnn-proved_while_compiling"),
        pytest.param(lambda: from_timm("test_vit"), "aot_eager", marks=pytest.mark.long, id="vit"),
        pytest.param(lambda: from_timm("test_coatnet"), "aot_eager", marks=pytest.mark.long, id="hybrid"),
    ],
)
def test_three_freeze_states_back_and_forth(build: Callable[[], FineTuneModel], backend: str) -> None:
    model = build()
    compiled = torch.compile(model, backend=backend, fullgraph=True)  # a graph break would raise
    every = len(model.layer_groups)
    graphs = []
    for trainable_groups in (0, 1, every, 1, 0, every, 0):
        model.freeze_backbone(trainable_groups=trainable_groups)
        with model.assert_frozen():
            step(compiled, model)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 3, 3, 3, 3, 3]


def test_an_eager_forward_in_between_causes_no_recompilation() -> None:
    model = from_module(None).freeze_backbone()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for forward in (compiled, model, compiled):
        step(forward, model)
    assert counters["stats"]["unique_graphs"] == 1


class Probabilities(Convolutions):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(dim=1)


# The compiler reads `.grad` of the tensors that it returns to Python at the graph break of the error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_network_that_processes_its_logits_raises() -> None:
    network = Probabilities()
    model = FineTuneModel.from_module(network, network.fc)
    with pytest.raises(ValueError, match="processes the output of its classifier 'fc'"):
        torch.compile(model, backend="aot_eager")(IMAGES)


@pytest.mark.slow
@needs_a_c_compiler
def test_a_whole_resnet_through_inductor() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=10)
    compiled = torch.compile(model, fullgraph=True)
    for trainable_groups in (0, 1, 5, 1, 0):
        step(compiled, model.freeze_backbone(trainable_groups=trainable_groups))
    assert counters["stats"]["unique_graphs"] == 3
