"""The check of the cut in each forward: it detects processing of the logits, and keeps no tensors alive."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules import module as torch_module

from backbone_finetune import FineTuneModel

INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A network whose classifier sits at `head.1`: (B, 4) -> (B, 2)."""

    def __init__(self, tail: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(6, 2))
        self.tail = tail

    def forward(self, x: Tensor, *, probabilities: bool = False) -> Tensor:
        logits = self.head(self.stem(x))
        if self.tail is not None:
            logits = self.tail(logits)
        return logits.softmax(dim=1) if probabilities else logits


class SoftmaxOfAFrozenHead(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.stem(x))
        return logits if self.head.training else logits.softmax(dim=1)


class ReturnsFeatures(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = self.head[0](self.stem(x))
        self.logits = self.head[1](features)
        return features


class Fails(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = weakref.ref(self.head(self.stem(x)))
        raise RuntimeError("out of memory")


def scale(logits: Tensor) -> Tensor:
    return logits.div_(0.07)


def rectify(logits: Tensor) -> Tensor:
    torch.relu_(logits)
    return logits


def cut(network: nn.Module, example_input: Tensor | None = None) -> FineTuneModel:
    return FineTuneModel.from_module(network, network.head[1], example_input=example_input)


def test_a_keyword_that_adds_a_softmax_raises_after_a_valid_call() -> None:
    model = cut(Net(), INPUTS)
    assert torch.equal(model(INPUTS), model(INPUTS))
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        model(INPUTS, probabilities=True)
    assert model(INPUTS).shape == (3, 2)


def test_a_softmax_that_freezing_turns_on_raises() -> None:
    model = cut(SoftmaxOfAFrozenHead())
    assert model.train()(INPUTS).shape == (3, 2)
    model.backbone.head.eval()
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        model(INPUTS)


def test_features_returned_instead_of_logits_raise() -> None:
    with pytest.raises(ValueError, match="or does not return it, and the cut"):
        cut(ReturnsFeatures())(INPUTS)


def test_a_network_that_returns_more_than_a_tensor_raises_and_an_adapter_works() -> None:
    @dataclasses.dataclass
    class Outputs:
        """Like a ModelOutput of transformers."""

        logits: Tensor

    class ReturnsOutputs(Net):
        def forward(self, x: Tensor) -> Outputs:
            return Outputs(self.head(self.stem(x)))

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ReturnsOutputs()

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).logits

    with pytest.raises(ValueError, match=r"it returns a Outputs, so wrap it in a module"):
        cut(ReturnsOutputs())(INPUTS)
    adapter = Adapter()
    model = FineTuneModel.from_module(adapter, adapter.network.head[1], example_input=INPUTS)
    assert torch.equal(model(INPUTS), adapter(INPUTS))


def test_a_forward_of_the_backbone_alone_is_checked() -> None:
    model = cut(Net())
    assert model.backbone(INPUTS).shape == (3, 6)
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        model.backbone(INPUTS, probabilities=True)


@pytest.mark.parametrize("tail", [scale, rectify])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_place_writes_raise(tail: Callable[[Tensor], Tensor], mode: Callable[[], torch.no_grad]) -> None:
    model, clean = cut(Net(tail)), cut(Net())
    with mode():
        for _ in range(2):
            assert clean(INPUTS).shape == (3, 2)
            with pytest.raises(ValueError, match="processes the output of its classifier"):
                model(INPUTS)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_in_place_writes_raise_while_a_compiler_traces(backend: str, mode: Callable[[], torch.no_grad]) -> None:
    clean = cut(Net()).eval()
    with mode():
        outputs = torch.compile(clean, backend=backend, fullgraph=True)(INPUTS)
        torch.testing.assert_close(outputs, clean(INPUTS))
        with pytest.raises(Exception, match="modifies the output of its classifier in place"):
            torch.compile(cut(Net(rectify)), backend=backend)(INPUTS)


@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("strict", [True, False])
def test_in_place_writes_raise_in_an_export(strict: bool) -> None:
    program = torch.export.export(cut(Net()).eval(), (INPUTS,), strict=strict)
    assert program.module()(INPUTS).shape == (3, 2)
    # Before torch 2.10, a strict export wraps the error in another one.
    with pytest.raises(
        (ValueError, InternalTorchDynamoError), match=r"(processes|modifies) the output of its classifier"
    ):
        torch.export.export(cut(Net(scale)).eval(), (INPUTS,), strict=strict)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed:UserWarning")
def test_backward_hooks_around_the_cut_are_allowed() -> None:
    model = cut(Net())
    called: list[str] = []

    def note(module: nn.Module, inputs: object, outputs: object) -> None:
        called.append(type(module).__name__)

    model.backbone.register_full_backward_hook(note)
    model.backbone.head.register_full_backward_hook(note)
    everywhere = (
        torch_module.register_module_full_backward_hook(note),
        torch_module.register_module_forward_hook(note),
    )
    try:
        model(INPUTS.clone().requires_grad_()).sum().backward()
        assert {"Net", "Sequential"} <= set(called)
        with pytest.raises(ValueError, match="processes the output of its classifier"):
            model(INPUTS, probabilities=True)
    finally:
        for handle in everywhere:
            handle.remove()
    assert model.backbone.stem.weight.grad is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_a_sharded_backbone_may_cast_its_output(mesh: dist.DeviceMesh) -> None:
    model = cut(Net())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model.backbone, mesh=mesh, mp_policy=policy)
    outputs = model(INPUTS)
    assert outputs.dtype == torch.float32
    outputs.sum().backward()
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        model(INPUTS, probabilities=True)


def test_existing_hooks_run_before_the_check_and_later_ones_after_it() -> None:
    network = Net()
    network.register_forward_hook(lambda module, inputs, output: output.softmax(dim=1))
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        cut(network)(INPUTS)
    model = cut(Net())
    model.backbone.register_forward_hook(lambda module, inputs, output: output.double().float())
    assert model(INPUTS).shape == (3, 2)


def test_threads_are_checked_independently() -> None:
    model = cut(Net())
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def run() -> None:
        start.wait()
        try:
            for _ in range(50):
                model(INPUTS)
        except ValueError as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_failed_forward_keeps_no_tensor_alive() -> None:
    network = Fails()
    model = cut(network)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(INPUTS)
    gc.collect()
    assert model.backbone.seen() is None
    cause = cut(Net(scale))
    with pytest.raises(ValueError, match="processes the output of its classifier"):
        cause(INPUTS)
    assert cause.backbone.head[1].calls.arrivals is None


def test_copies_and_pickles_check_their_own_cut() -> None:
    model = cut(Net())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(INPUTS), model(INPUTS))
        with pytest.raises(ValueError, match="processes the output of its classifier"):
            twin(INPUTS, probabilities=True)
        assert torch.equal(twin.to_module()(INPUTS, probabilities=True), model(INPUTS).softmax(dim=1))


def test_gradients_per_sample_and_through_a_recomputed_forward() -> None:
    model = cut(Net())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (sample[None],)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, INPUTS)
    assert gradients["backbone.stem.weight"].shape == (3, 6, 4)
    torch.utils.checkpoint.checkpoint(model, INPUTS.clone().requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(model.backbone.stem.weight.grad, gradients["backbone.stem.weight"].sum(0))


class TupleOfFeatures(nn.Module):
    def __init__(self, returned: Callable[[tuple[Tensor, Tensor]], object]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.head = nn.Sequential(nn.Identity(), PairClassifier())
        self.returned = returned

    def forward(self, x: Tensor) -> object:
        features = self.stem(x)
        return self.returned(self.head((features, 2 * features)))


class PairClassifier(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[1], pair[0]


def test_a_classifier_with_several_output_tensors() -> None:
    left, right = cut(TupleOfFeatures(lambda pair: pair), INPUTS)(INPUTS)
    torch.testing.assert_close(left, 2 * right)
    for wrong in (lambda pair: pair[0], lambda pair: (pair[1], pair[0]), lambda pair: (pair[0], pair[1] + 0)):
        with pytest.raises(ValueError, match="processes the output of its classifier"):
            cut(TupleOfFeatures(wrong))(INPUTS)


class AuxiliaryInTraining(Net):
    def forward(self, x: Tensor) -> object:
        logits = super().forward(x)
        return (logits, x) if self.training else logits


def test_an_example_input_checks_both_modes_at_construction() -> None:
    network = AuxiliaryInTraining().eval()
    with pytest.raises(ValueError, match=r"in train mode \(.*auxiliary heads: net\.aux_logits = False"):
        cut(network, INPUTS)
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))  # BatchNorm cannot train on one sample
    model = FineTuneModel.from_module(normed, normed[2], example_input=INPUTS[:1])
    assert model.train()(INPUTS).shape == (3, 2)
    assert normed[1].num_batches_tracked == 1
