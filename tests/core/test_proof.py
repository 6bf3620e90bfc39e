"""`frozen_fingerprint` and `assert_frozen`: coverage, cost and error messages."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from wrapped_tensors import Quantised, quantise

from backbone_finetune import FineTuneModel
from backbone_finetune.verification import digest, shared_memory


class Tables(nn.Module):
    """A layer with one buffer that is saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("saved", torch.arange(3.0))
        self.register_buffer("derived", torch.arange(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs)


def small_model() -> FineTuneModel:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Tables())
    return FineTuneModel(backbone, nn.Linear(4, 2)).freeze_backbone()


def test_it_covers_parameters_and_all_buffers() -> None:
    model = small_model()
    names = {name for name, _ in (*model.backbone.named_parameters(), *model.backbone.named_buffers())}
    assert set(model.frozen_fingerprint()) == {f"backbone.{name}" for name in names}
    assert "backbone.2.derived" in model.frozen_fingerprint()
    model.freeze_backbone(trainable_groups=1)
    assert set(model.frozen_fingerprint()) == {f"backbone.{name}" for name in names if not name.startswith("2.")}


@pytest.mark.parametrize(
    "name", ["0.weight", "0.bias", "1.running_var", "1.num_batches_tracked", "2.saved", "2.derived", "2.linear.bias"]
)
def test_one_changed_bit_is_detected(name: str) -> None:
    model = small_model()
    tensors = {**dict(model.backbone.named_parameters()), **dict(model.backbone.named_buffers())}
    before = model.frozen_fingerprint()
    with (
        pytest.raises(AssertionError, match=rf"1 of 11 .*\n.*backbone\.{name}: "),
        model.assert_frozen(),
        torch.no_grad(),
    ):
        tensors[name].view(-1)[-1:].view(torch.uint8)[0] ^= 1
    after = model.frozen_fingerprint()
    assert [key for key in before if before[key] != after[key]] == [f"backbone.{name}"]


def test_minus_zero_and_nan_are_compared_as_bits() -> None:
    model = small_model()
    with torch.no_grad():
        model.backbone[0].bias.fill_(float("nan"))
        model.backbone[0].weight.zero_()
    with model.assert_frozen():
        pass
    with pytest.raises(AssertionError, match=r"backbone\.0\.weight"), model.assert_frozen(), torch.no_grad():
        model.backbone[0].weight.neg_()


def test_a_changed_dtype_or_shape_is_detected_with_equal_bits() -> None:
    zeros = torch.zeros(4)
    others = (torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(1, 4))
    assert len({digest(tensor) for tensor in (zeros, *others)}) == 4


def values_of(sparse: Tensor) -> Tensor:
    return sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_changed_sparse_buffer_is_detected(layout: torch.layout) -> None:
    model = small_model()
    model.backbone.register_buffer("graph", torch.eye(3).to_sparse(layout=layout))
    with model.assert_frozen():
        pass
    with pytest.raises(AssertionError, match=r"backbone\.graph: a buffer"), model.assert_frozen():
        model.backbone.graph = torch.eye(3).roll(1, 0).to_sparse(layout=layout)
    with pytest.raises(AssertionError, match=r"backbone\.graph: a buffer"), model.assert_frozen():
        values_of(model.backbone.graph)[1] = 2.0


WITHOUT_STRIDES = {
    "nested": lambda value: torch.nested.nested_tensor([torch.full((2,), value), torch.zeros(3)]),
    "jagged": lambda value: torch.nested.nested_tensor([torch.full((2,), value), torch.zeros(3)], layout=torch.jagged),
    "mkldnn": lambda value: torch.full((2, 2), value).to_mkldnn(),
    "wrapped": lambda value: Quantised(torch.full((2,), int(value), dtype=torch.int8), torch.tensor(0.5)),
    "scale": lambda value: Quantised(torch.ones(2, dtype=torch.int8), torch.tensor(value)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("kind", WITHOUT_STRIDES)
def test_a_changed_tensor_subclass_is_detected(kind: str) -> None:
    model = small_model()
    model.backbone.register_buffer("table", WITHOUT_STRIDES[kind](1.0))
    with model.assert_frozen():
        pass
    with pytest.raises(AssertionError, match=r"backbone\.table: a buffer"), model.assert_frozen():
        model.backbone.table = WITHOUT_STRIDES[kind](2.0)


def test_tensors_without_values_are_compared_by_shape() -> None:
    model = small_model()
    model.backbone.append(nn.LazyBatchNorm1d(affine=False).eval())
    model.backbone.register_buffer("table", torch.empty(2, device="meta"))
    with model.assert_frozen():
        pass
    with pytest.raises(AssertionError) as caught, model.assert_frozen():  # noqa: PT012
        model.backbone.table = torch.empty(3, device="meta")
        model(torch.zeros(2, 4))
    for name in ("backbone.table", "backbone.3.running_mean", "backbone.3.running_var"):
        assert name in str(caught.value)


def test_quantised_weights_are_checked_and_stay_frozen() -> None:
    model = small_model()
    model.backbone[0].weight = quantise(model.backbone[0].weight)
    before = model.frozen_fingerprint()
    with pytest.warns(UserWarning, match=r"1 quantised parameters \(0\.weight\) get no gradient and stay frozen"):
        model.unfreeze_backbone()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["backbone.0.weight"]
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1, weight_decay=0.1))
    with model.assert_frozen():
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    model.backbone[0].weight.values[0, 0] += 1
    after = model.freeze_backbone().frozen_fingerprint()
    assert before["backbone.0.weight"] != after["backbone.0.weight"]


def test_weights_that_torchao_quantised() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    backbone = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    quantization.quantize_(backbone, quantization.Int8WeightOnlyConfig())
    model = FineTuneModel(backbone, nn.Linear(32, 2))
    with pytest.warns(UserWarning, match=r"2 quantised parameters \(0\.weight, 2\.weight\) get no gradient"):
        model.unfreeze_backbone()
    optimizer = torch.optim.AdamW(model.param_groups(lr=0.1, weight_decay=0.1))
    with model.assert_frozen():
        model(torch.randn(8, 32)).sum().backward()
        optimizer.step()
    assert model.frozen_names() == {"backbone.0.weight", "backbone.2.weight"}


@pytest.mark.parametrize("view", [lambda weight: weight, lambda weight: weight.t(), lambda weight: weight[1:]])
def test_memory_shared_with_a_trainable_parameter_is_reported(view: Callable[[Tensor], Tensor]) -> None:
    model = FineTuneModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    model.backbone[0].weight.data = view(model.backbone[1].weight.data)
    model.backbone[0].requires_grad_(False)
    cause = r"0: backbone\.0\.weight: it shares memory with backbone\.1\.weight, which trains"
    with pytest.raises(AssertionError, match=cause), model.assert_frozen():
        model.backbone[1].weight.data += 1


def test_interleaved_parameters_in_one_storage_do_not_share_memory() -> None:
    whole = torch.zeros(4, 8)
    left, right = nn.Parameter(whole[:, :4], requires_grad=False), nn.Parameter(whole[:, 4:])
    assert shared_memory([("left", left), ("right", right)]) == []


def test_max_norm_of_an_embedding_is_reported() -> None:
    model = FineTuneModel(nn.Embedding(3, 4, max_norm=0.1), nn.Linear(4, 2)).freeze_backbone()
    cause = "weight: rescaled in the forward by the max_norm of its embedding"
    with pytest.raises(AssertionError, match=cause), model.assert_frozen():
        model(torch.arange(3))


def test_frozen_names_are_those_of_the_fingerprint() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(trainable_groups=1)
    assert model.frozen_names() == set(model.frozen_fingerprint())
    assert "backbone.bn1.running_mean" in model.frozen_names()


def test_training_passes_and_trainable_parameters_may_change() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone(trainable_groups=1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    before = model.backbone.layer4[0].bn1.running_mean.clone()
    with model.assert_frozen():
        for _ in range(2):
            model.train()
            optimizer.zero_grad()
            model(torch.randn(4, 3, 32, 32)).sum().backward()
            optimizer.step()
    assert not torch.equal(model.backbone.layer4[0].bn1.running_mean, before)


def test_the_error_lists_layer_groups_and_causes() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).freeze_backbone()
    with pytest.raises(AssertionError) as caught, model.assert_frozen(), torch.no_grad():  # noqa: PT012
        model.backbone.layer1[0].conv1.weight.mul_(0.9)
        nn.Module.train(model.backbone.layer3, True)  # as a trainer would do
        model(torch.randn(2, 3, 32, 32))
        model.backbone.layer4[0].conv1.weight.requires_grad_(True)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("assert_frozen: ")
    by_group = {line.partition(": ")[0]: line for line in lines}
    assert list(by_group) == ["layer1", "layer3", "layer4"]
    assert "layer1.0.conv1.weight: written to, by an optimizer" in by_group["layer1"]
    assert "more: a running statistic, updated by a forward" in by_group["layer3"]
    assert by_group["layer3"].endswith(", or by a load")
    assert "layer4.0.conv1.weight: unfrozen inside" in by_group["layer4"]


def test_a_buffer_that_a_forward_replaces_is_reported_as_such() -> None:
    model = FineTuneModel.from_timm("convit_tiny", num_classes=3, img_size=32).freeze_backbone()
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(AssertionError, match=r"rel_indices: a buffer, .*first forward"), model.assert_frozen():
        model(images)
    with model.assert_frozen():
        model(images)


def test_a_replaced_module_is_reported() -> None:
    model = small_model()
    with pytest.raises(AssertionError, match="no longer in the model"), model.assert_frozen():
        model.backbone[1] = nn.Identity()


def test_unfreezing_inside_is_reported_even_without_changes() -> None:
    model = small_model()
    named = r"2: backbone\.2\.linear\.bias.*: unfrozen inside"
    with pytest.raises(AssertionError, match=named), model.assert_frozen():
        model.freeze_backbone(trainable_groups=1)


def test_a_model_without_frozen_tensors_passes() -> None:
    model = small_model().unfreeze_backbone()
    with model.assert_frozen(), torch.no_grad():
        model.backbone[0].weight.zero_()
    assert model.frozen_fingerprint() == {}


def test_an_exception_inside_is_not_changed() -> None:
    model = small_model()
    error = KeyError("the loader's own")
    with pytest.raises(KeyError) as caught, model.assert_frozen():  # noqa: PT012
        model.backbone[0].weight.data.zero_()
        raise error
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_freezing_inside_passes() -> None:
    model = small_model().freeze_backbone(trainable_groups=1)
    with model.assert_frozen():
        model.freeze_backbone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_and_any_memory_format(dtype: torch.dtype) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=3).to(dtype).freeze_backbone()
    before = model.frozen_fingerprint()
    assert model.to(memory_format=torch.channels_last).frozen_fingerprint() == before
    assert model.to(torch.float32).frozen_fingerprint() != before


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_a_sharded_tensor_is_compared_by_its_local_shard(mesh: dist.DeviceMesh) -> None:
    model = small_model()
    plain = model.frozen_fingerprint()["backbone.0.weight"]
    sharded = distribute_tensor(model.backbone[0].weight.detach(), mesh, [Shard(0)])
    model.backbone[0].weight = nn.Parameter(sharded, requires_grad=False)
    assert model.frozen_fingerprint()["backbone.0.weight"] == plain  # one process: its shard is the whole tensor
    weight = model.backbone[0].weight
    assert isinstance(weight, DTensor)
    with pytest.raises(AssertionError, match=r"0: backbone\.0\.weight: written to"), model.assert_frozen():
        weight.to_local().data[-1, -1] += 1


WITHOUT_A_COPY = """
import resource, torch
from torch import nn
from backbone_finetune import FineTuneModel
torch.set_num_threads(1)
side = 2048
layers = [nn.Linear(side, side, bias=False) for _ in range(24)]  # 16 MiB each, 384 MiB together
model = FineTuneModel(nn.Sequential(*layers), nn.Linear(side, 2)).freeze_backbone()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
with model.assert_frozen():
    model.frozen_fingerprint()
print(peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in KiB on Linux alone")
def test_no_second_copy_of_the_model_in_memory() -> None:
    # A separate process, because the peak memory of this one depends on other tests.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COPY], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 48 * 1024, "KiB more at the peak, beside 384 MiB of weights"


@pytest.mark.usefixtures("one_thread")
def test_it_costs_at_most_a_forward_of_16_images() -> None:
    model = FineTuneModel.from_timm("resnet18", num_classes=10).freeze_backbone()
    images = torch.randn(16, 3, 128, 128)  # stricter than at the network's own 224 pixels

    def seconds_of_proof() -> float:
        start = time.process_time()
        model.frozen_fingerprint()
        return time.process_time() - start

    def seconds_of_forward() -> float:
        start = time.process_time()
        with torch.no_grad():
            model(images)
        return time.process_time() - start

    # CPU seconds, measured alternately, so that other load on the machine does not count.
    ratios = [seconds_of_proof() / seconds_of_forward() for _ in range(3)]
    assert statistics.median(ratios) < 1, ratios
