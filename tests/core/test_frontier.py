"""The frontier: cached tensors give the same results as the whole network, or NoFrontier has the reason."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm_families import SMALL, each
from torch import Tensor, nn
from torch.nn.functional import dropout, relu_
from torch.utils.checkpoint import checkpoint

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import Frontier, KeptTensor, NoFrontier, find_frontier

WORKER = Path(__file__).parents[1] / "helpers" / "frontier_worker.py"
BATCH = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def conv(width: int = 3, out: int = 3) -> nn.Module:
    return nn.Conv2d(width, out, 3, padding=1)


class Net(nn.Module):
    """Frozen `front` and `middle`, trainable `back` and `head`; each test combines them."""

    def __init__(self, flow: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = frozen(conv())
        self.middle = frozen(nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(inplace=True)))
        self.back = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
        self.head = nn.Linear(3, 5)
        self.flow = flow
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> Any:
        return self.flow(self, images)


def to_head(net: Net, features: Tensor) -> Tensor:
    return net.head(features.mean((2, 3)))


def plain(net: Net, images: Tensor) -> Tensor:
    return to_head(net, net.back(net.middle(net.front(images))))


def found(network: nn.Module, batch: Tensor = BATCH) -> Frontier:
    frontier = find_frontier(network, batch)
    assert isinstance(frontier, Frontier), frontier
    return frontier


def reason(network: nn.Module, batch: Tensor = BATCH) -> str:
    refused = find_frontier(network, batch)
    assert isinstance(refused, NoFrontier), refused
    return refused.reason


def places(frontier: Frontier) -> list[str]:
    return [kept.place for kept in frontier.kept]


def step(network: nn.Module, forward: Callable[[], Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return logits, gradients and buffers of one step, always from the same initial state."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.zero_grad()
    torch.manual_seed(0)
    output = forward()
    output.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    after = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    return output.detach(), gradients, after


def assert_equals_whole(network: nn.Module, frontier: Frontier, batch: Tensor = OTHER) -> None:
    """Compare on a new batch, with another batch recorded in between."""
    tensors = frontier.record(batch)
    frontier.record(batch.flip(0))
    expected, actual = step(network, lambda: network(batch)), step(network, lambda: frontier.replay(tensors))
    assert torch.equal(expected[0], actual[0])
    for whole, cached in zip(expected[1:], actual[1:], strict=True):
        assert whole.keys() == cached.keys()
        assert all(torch.equal(whole[name], cached[name]) for name in whole)
    assert expected[1]


@pytest.mark.parametrize("family", each(SMALL, costly=["crossvit"]))
def test_families(family: str) -> None:
    model = FineTuneModel.from_timm(SMALL[family].architecture, num_classes=5, **SMALL[family].keywords)
    model.freeze_backbone(trainable_groups=len(model.layer_groups) // 2).train()
    images = SMALL[family].images(3)
    frontier = found(model, images)
    assert_equals_whole(model, frontier, SMALL[family].images(4))


def test_kept_tensors_are_described() -> None:
    frontier = found(Net(plain))
    assert frontier.kept == (KeptTensor("middle", 0, None, (3, 8, 8), torch.float32, 768),)
    assert frontier.bytes_per_image == 768
    assert str(frontier) == "middle: 3 x 8 x 8 float32, 0.8 kB per image"


def test_a_frozen_backbone_keeps_its_features() -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone().train()
    images = torch.randn(4, 3, 32, 32)
    frontier = found(model, images)
    assert frontier.kept == (KeptTensor("backbone", 0, None, (96,), torch.float32, 384),)
    assert_equals_whole(model, frontier, images)


def test_a_model_from_from_module() -> None:
    net = Net(plain)
    model = FineTuneModel.from_module(net, net.head)
    for groups in (0, 1):
        model.freeze_backbone(trainable_groups=groups).train()
        assert_equals_whole(model, found(model))


@pytest.mark.parametrize("norm_eval", [True, False])
def test_running_statistics(norm_eval: bool) -> None:
    model = FineTuneModel.from_timm("test_resnet", num_classes=5, norm_eval=norm_eval)
    model.freeze_backbone(trainable_groups=1).train()
    assert_equals_whole(model, found(model, torch.randn(4, 3, 32, 32)), torch.randn(4, 3, 32, 32))


def in_place(net: Net, images: Tensor) -> Tensor:
    return to_head(net, net.back(relu_(net.middle(relu_(net.front(images))))))


def functional_dropout(net: Net, images: Tensor) -> Tensor:
    return to_head(net, dropout(net.back(net.middle(net.front(images))), 0.5, net.training))


def two_tensors(net: Net, images: Tensor) -> Tensor:
    early = net.front(images)
    return to_head(net, net.back(net.middle(early)) + early)


def twice(net: Net, images: Tensor) -> Tensor:
    early = net.front(images)
    late = net.front(early)
    return to_head(net, net.back(early) + net.back(late))


def before_and_after(net: Net, images: Tensor) -> Tensor:
    return to_head(net, net.middle(net.back(net.middle(net.front(images)))))


def with_gradients_off(net: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        features = net.middle(net.front(images))
    return to_head(net, net.back(features))


def detached(net: Net, images: Tensor) -> Tensor:
    """`middle` depends on trainable parameters, but autograd does not track it."""
    features = net.front(images)
    return to_head(net, net.back(features) + net.middle(net.back(features).detach()))


def through_python(net: Net, images: Tensor) -> Tensor:
    features = net.front(images)
    scale = net.back(features).detach().sum().item()
    return to_head(net, net.back(features) + net.middle(features * scale))


def always_random(net: Net, images: Tensor) -> Tensor:
    """Everything after the dropout differs between epochs, so it is not cached."""
    return to_head(net, net.back(net.middle(dropout(net.front(images), 0.5, True))))


def from_a_list(net: Any, images: Tensor) -> Tensor:
    """Frozen modules in a list, which is never called itself."""
    for module in net.listed:
        images = module(images)
    return to_head(net, net.back(images))


def only_in_eval(net: Net, images: Tensor) -> Tensor:
    features = net.front(images)
    middle = net.middle(features)
    return to_head(net, net.back(features) + (0 if net.training else middle))


@pytest.mark.parametrize(
    ("flow", "kept"),
    [
        (in_place, ["middle"]),
        (functional_dropout, ["middle"]),
        (two_tensors, ["front", "middle"]),
        (twice, ["front", "front (call 2)"]),
        (before_and_after, ["middle"]),
        (with_gradients_off, ["middle"]),
        (detached, ["front"]),
        (through_python, ["front"]),
        (always_random, ["front"]),
        (only_in_eval, ["front", "middle"]),
        (from_a_list, ["listed.1"]),
    ],
)
def test_flows(flow: Callable[[Net, Tensor], Tensor], kept: list[str]) -> None:
    net = Net(flow, listed=frozen(nn.ModuleList([conv(), conv()])))
    frontier = found(net)
    assert places(frontier) == kept
    assert [(kept.path, kept.call) for kept in frontier.kept] == [
        (place.partition(" ")[0], int("call 2" in place)) for place in kept
    ]
    assert_equals_whole(net, frontier)
    with torch.no_grad():  # the trainable part has changed
        for parameter in (*net.back.parameters(), *net.head.parameters()):
            parameter.add_(0.1)
    assert_equals_whole(net, frontier)
    tensors = frontier.record(OTHER)
    net.training = False
    torch.manual_seed(0)
    expected = net(OTHER)
    torch.manual_seed(0)
    assert torch.equal(frontier.replay(tensors), expected)


class Pieces(nn.Module):
    """Frozen, returns a tuple and a dict: windows, tokens (L, B, C), a table, a size, the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> tuple[dict[str, Any], tuple[int, int]]:
        scaled = images * self.scale
        windows = scaled.unfold(2, 4, 4).permute(0, 2, 1, 3, 4).flatten(0, 1)
        tokens = scaled.flatten(2).permute(2, 0, 1)
        return {"windows": windows, "tokens": tokens, "table": self.scale * torch.arange(3.0)}, images.shape[2:]


def of_pieces(net: Any, images: Tensor) -> Tensor:
    pieces, (height, _) = net.pieces(images)
    windows = pieces["windows"].unflatten(0, (-1, 2)).mean((1, 3, 4))
    return net.head(net.head_before(windows + pieces["tokens"].mean(0) + pieces["table"]) * height)


def test_tuples_and_dicts_of_all_layouts() -> None:
    net = Net(of_pieces, pieces=frozen(Pieces()), head_before=nn.Linear(3, 3))
    frontier = found(net)
    assert [(kept.index, kept.shape) for kept in frontier.kept] == [(0, (2, 3, 8, 4)), (1, (64, 3))]
    assert places(frontier) == ["pieces[0]", "pieces[1]"]
    assert_equals_whole(net, frontier)
    assert_equals_whole(net, frontier, OTHER[:3])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_modules_in_a_checkpoint_are_not_cached(use_reentrant: bool) -> None:
    def flow(net: Net, images: Tensor) -> Tensor:
        early = checkpoint(net.front, images, use_reentrant=False)  # frozen as a whole: no recomputation
        late = checkpoint(
            lambda x: net.back(net.middle(x)), early.requires_grad_(use_reentrant), use_reentrant=use_reentrant
        )
        return to_head(net, late)

    net = Net(flow)
    frontier = found(net)
    assert places(frontier) == ["front"]
    assert_equals_whole(net, frontier)


def test_checkpointing_that_is_turned_on_later_raises() -> None:
    def flow(net: Any, images: Tensor) -> Tensor:
        inner = lambda x: net.back(net.middle(x))  # noqa: E731
        early = net.front(images)
        return to_head(net, checkpoint(inner, early, use_reentrant=False) if net.saves_memory else inner(early))

    net = Net(flow)
    net.saves_memory = False
    frontier = found(net)
    tensors = frontier.record(BATCH)
    net.saves_memory = True
    with pytest.raises(RuntimeError, match="backward recomputes middle, which is cached"):
        frontier.replay(tensors).sum().backward()


def test_autocast_and_channels_last() -> None:
    net = Net(plain).to(memory_format=torch.channels_last)
    batch = BATCH.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        frontier = found(net, batch)
        assert frontier.kept[0].dtype == torch.bfloat16
        assert_equals_whole(net, frontier, batch)
        tensors = frontier.record(batch)
    with pytest.raises(RuntimeError, match=r"autocast is off, and was torch\.bfloat16"):
        frontier.replay(tensors)


def test_hooks_of_cached_modules_run_in_record() -> None:
    net, calls = Net(plain), []
    net.middle.register_forward_hook(lambda module, inputs, output: output * 2)
    net.back.register_forward_hook(lambda module, inputs, output: calls.append("back"))
    frontier = found(net)
    assert_equals_whole(net, frontier)
    tensors = frontier.record(BATCH)
    calls.clear()
    frontier.replay(tensors)
    assert calls == ["back"]


def batch_contrast(net: Net, images: Tensor) -> Tensor:
    features = net.front(images)
    return to_head(net, net.back(net.middle(features - features.mean(0))))


def slight_batch_contrast(net: Net, images: Tensor) -> Tensor:
    features = net.front(images)
    return to_head(net, net.back(net.middle(features - 1e-5 * features.mean(0))))


def contrast_with_the_first(net: Net, images: Tensor) -> Tensor:
    features = net.front(images)
    return to_head(net, net.back(net.middle(features - features[:1])))


def by_position(net: Net, images: Tensor) -> Tensor:
    positions = torch.arange(len(images)).view(-1, 1, 1, 1)
    return to_head(net, net.back(net.middle(net.front(images) + positions)))


def other_order(net: Net, images: Tensor) -> Tensor:
    front = net.front(images)
    front = torch.stack((front[: len(front) // 2], front[len(front) // 2 :]), 1).flatten(0, 1)
    return to_head(net, net.back(net.middle(front)))


def python_random(net: Net, images: Tensor) -> Tensor:
    return to_head(net, net.back(net.middle(net.front(images) * random.random())))


def rarely_random(net: Net, images: Tensor) -> Tensor:
    return to_head(net, net.back(net.middle(net.front(images) * (random.random() > 1e-9))))


def left_on_a_frozen_module(net: Any, images: Tensor) -> Tensor:
    return to_head(net, net.back(net.keeping(images)) + net.keeping.kept)


def counting(net: Any, images: Tensor) -> Tensor:
    net.count = getattr(net, "count", 0) + 1
    return to_head(net, net.back(net.middle(net.front(images) + net.count)))


def image_again(net: Net, images: Tensor) -> Tensor:
    return plain(net, images) + to_head(net, images)


def beside(net: Net, images: Tensor) -> Tensor:
    net.front(images)
    return to_head(net, net.back(images))


def a_rare_comparison(net: Net, images: Tensor) -> Tensor:
    return plain(net, images) + (images > 100).float().mean()


def with_normalisation(net: Any, images: Tensor) -> Tensor:
    return to_head(net, net.back(net.middle(net.whiten(net.front(images)))))


@pytest.mark.parametrize(
    ("flow", "why"),
    [
        (batch_contrast, "the output of middle for an image depends on the other images"),
        (with_normalisation, "the output of middle for an image depends on the other images"),
        (slight_batch_contrast, "the output of middle for an image depends on the other images"),
        (contrast_with_the_first, "the output of middle for an image depends on the other images"),
        (by_position, "the output of middle for an image depends on the other images"),
        (other_order, "the output of middle for an image depends on the other images"),
        (python_random, "draw from Python's random module"),
        (rarely_random, "draw from Python's random module"),
        (left_on_a_frozen_module, "the network runs, and a copy that shares its tensors raises"),
        (counting, "the network returns another output for the same images"),
        (image_again, "the trainable part needs more than the outputs"),
        (a_rare_comparison, "the trainable part needs more than the outputs"),
        (lambda net, images: to_head(net, net.back(images)), "no frozen module depends on the input alone"),
        (
            lambda net, images: (net.front(images), to_head(net, net.back(images)))[1],
            "does not depend on frozen modules",
        ),
        (lambda net, images: to_head(net, net.middle(net.back(images))), "no frozen module depends on the input alone"),
        (lambda net, images: plain(net, images) * torch.nan, "contains NaN"),
        (lambda net, images: plain(net, images).detach(), "does not require a gradient"),
    ],
)
def test_networks_without_a_frontier(flow: Callable[[Net, Tensor], Tensor], why: str) -> None:
    net = Net(flow, whiten=nn.BatchNorm2d(3, affine=False), keeping=frozen(Keeping()))
    assert re.search(why, reason(net))


class Keeping(nn.Module):
    """Leaves what it computed on itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, images: Tensor) -> Tensor:
        self.kept = self.inner(images)
        return self.kept * 2


def test_state_that_a_frozen_module_keeps_of_this_batch_is_detected() -> None:
    net = Net(left_on_a_frozen_module, keeping=frozen(Keeping()))
    net(BATCH)
    assert "a copy that shares its tensors raises" in reason(net)


def test_a_frozen_module_that_counts_its_forwards_in_a_buffer() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, images: Tensor) -> Tensor:
            self.count.add_(1)
            return self.inner(images)

    net = Net(plain)
    net.front = frozen(Counting())
    before = trace_of(net)
    assert reason(net) == "after a forward, front.count has changed"
    assert trace_of(net) == before


def test_a_table_that_the_first_forward_fills_stays_filled() -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv()
            self.is_filled = False
            self.register_buffer("table", torch.zeros(8, 8))

        def forward(self, images: Tensor) -> Tensor:
            if not self.is_filled:
                self.table.fill_(2)
                self.is_filled = True
            return self.inner(images) * self.table

    net = Net(plain)
    net.front = frozen(Filling())
    assert_equals_whole(net, found(net))
    assert net.front.table.eq(2).all()


def test_nan_that_passes_between_images_without_a_dependence() -> None:
    class Leaking(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images + 0 * images.sum(0)  # as in kernels that multiply the padding of a tile by 0

    net = Net(plain)
    net.front = frozen(nn.Sequential(conv(), Leaking()))
    assert_equals_whole(net, found(net))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_record_leaves_the_statistics_of_a_scripted_module() -> None:
    def flow(net: Any, images: Tensor) -> Tensor:
        front = net.front(images)
        return to_head(net, net.back(net.scripted(front)) + net.middle(front))

    net = Net(flow, scripted=torch.jit.script(nn.Sequential(conv(), nn.BatchNorm2d(3))))
    frontier = found(net)
    before = [buffer.clone() for buffer in net.buffers()]
    frontier.record(OTHER)
    assert all(map(torch.equal, net.buffers(), before))


def test_state_that_a_hook_keeps_is_detected() -> None:
    def flow(net: Any, images: Tensor) -> Tensor:
        return plain(net, images) + to_head(net, net.aside["features"])

    net = Net(flow)
    net.aside = {}
    net.front.register_forward_hook(lambda module, inputs, output: net.aside.update(features=output))
    assert "state from a hook or an earlier call" in reason(net)


def test_networks_with_nothing_to_cache() -> None:
    assert reason(Net(plain).requires_grad_(True)) == "every parameter trains"
    assert reason(Net(plain).requires_grad_(False)) == "no parameter trains"
    assert reason(Net(plain).train()) == "front is frozen and in train mode; call its eval()"
    with pytest.raises(ValueError, match=r"got tensors of shape \(2, 3, 8, 8\); pass a batch of 3 or more images"):
        find_frontier(Net(plain), BATCH[:2])


def trace_of(network: nn.Module) -> list[Any]:
    """Return all state of a network that a search could have changed."""
    return [
        [(id(module), {k: id(v) for k, v in vars(module).items() if k != "count"}) for module in network.modules()],
        [[list(v) for k, v in vars(module).items() if "_hooks" in k] for module in network.modules()],
        [module.training for module in network.modules()],
        [tensor.tolist() for tensor in network.state_dict().values()],
        [parameter.grad for parameter in network.parameters()],
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("flow", [plain, functional_dropout, image_again, only_in_eval])
def test_the_search_does_not_change_the_network(flow: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(flow)
    before = trace_of(net)
    frontier = find_frontier(net, BATCH)
    assert trace_of(net) == before
    if isinstance(frontier, Frontier):
        frontier.record(BATCH)
        assert trace_of(net) == before


def test_an_error_does_not_change_the_network() -> None:
    def flow(net: Net, images: Tensor) -> Tensor:
        output = plain(net, images)
        if not net.training:
            raise ArithmeticError("not in eval")
        return output

    net = Net(flow)
    before = trace_of(net)
    with pytest.raises(ArithmeticError, match="not in eval"):
        find_frontier(net, BATCH)
    assert trace_of(net) == before


def test_attributes_that_a_forward_sets_are_set_on_the_network() -> None:
    def flow(net: Any, images: Tensor) -> Tensor:
        features = net.middle(net.front(images))
        net.steps = getattr(net, "steps", 0) + 1
        return to_head(net, net.back(features)) * net.temperature

    net = Net(flow)
    net.temperature = 1.0
    frontier = found(net)
    tensors = frontier.record(BATCH)
    net.steps, net.temperature = 10, 3.0
    output = frontier.replay(tensors)
    assert net.steps == 11
    assert torch.equal(output, net(BATCH))


def test_other_threads_are_not_affected() -> None:
    """One thread replays, another runs the whole network, and a third replays other images."""
    net = Net(plain).eval()
    frontier = found(net)
    tensors, others = frontier.record(BATCH), frontier.record(OTHER)
    expected = {"whole": net(OTHER), "cached": net(OTHER)}
    results: dict[str, Tensor] = {}

    def meanwhile(module: nn.Module, inputs: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not results:
            calls = {"whole": lambda: net(OTHER), "cached": lambda: frontier.replay(others)}
            threads = [
                threading.Thread(target=lambda name=name, call=call: results.update({name: call()}))
                for name, call in calls.items()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)

    handle = net.head.register_forward_pre_hook(meanwhile)
    output = frontier.replay(tensors)
    handle.remove()
    assert torch.equal(output, net(BATCH))
    assert results.keys() == expected.keys()
    assert all(torch.equal(results[name], expected[name]) for name in expected)


class Remembering(nn.Module):
    """Sets attributes, buffers and globals between two frozen modules, and reads some of them later."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = frozen(conv()), frozen(conv())
        self.norm = nn.BatchNorm2d(3)
        self.drop = 0.0

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        early = self.early(images)
        aside = dropout(self.norm(early), self.drop) if self.drop else self.norm(early)
        return aside + self.late(self.images + early)


def remembering(net: Any, images: Tensor) -> Tensor:
    return to_head(net, net.remembering(images))


def test_threads_record_at_the_same_time_without_changing_the_network() -> None:
    net = Net(remembering, remembering=Remembering())
    frontier = found(net)
    assert places(frontier) == ["remembering.early", "remembering.late"]
    batches = [torch.randn(2 + number, 3, 8, 8) for number in range(6)]
    alone = [frontier.record(batch) for batch in batches]
    both_are_inside = threading.Barrier(2)
    net.get_submodule("remembering.norm").register_forward_hook(lambda *_: both_are_inside.wait(60) and None)
    before = trace_of(net)
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(frontier.record, batches))
    for one, other in zip(alone, at_once, strict=True):
        assert all(map(torch.equal, one, other))
    assert trace_of(net) == before


def test_threads_that_draw_random_numbers_restore_the_random_state() -> None:
    net = Net(remembering, remembering=Remembering())
    net.get_submodule("remembering").drop = 0.5  # type: ignore[assignment]
    frontier = found(net)
    batches = [torch.randn(2 + number % 3, 3, 8, 8) for number in range(20)]
    alone = [frontier.record(batch) for batch in batches]
    late = net.get_submodule("remembering.late")
    late.register_forward_pre_hook(lambda _, inputs: time.sleep(0.003 * len(inputs[0])))  # the other starts meanwhile
    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        at_once = list(threads.map(frontier.record, batches))
    for one, other in zip(alone, at_once, strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(torch.get_rng_state(), before)


def unfreeze(net: Net) -> None:
    net.front.requires_grad_(True)


def change(net: Net) -> None:
    with torch.no_grad():
        net.front.weight.add_(1)


def replace_tensor(net: Net) -> None:
    net.load_state_dict({name: tensor + 1 for name, tensor in net.state_dict().items()}, assign=True)


def remove_tensor(net: Net) -> None:
    net.front.bias = None


def wake(net: Net) -> None:
    net.middle.train()


def replace_frozen(net: Net) -> None:
    net.middle[0] = conv()


def replace_trainable(net: Net) -> None:
    net.head = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("meddle", "what"),
    [
        (unfreeze, r"front\.weight trains, and was frozen"),
        (change, r"front\.weight has changed"),
        (replace_tensor, r"front\.weight has changed"),
        (remove_tensor, r"front\.bias was removed"),
        (wake, "middle is in train mode, and was frozen in eval"),
        (replace_frozen, "a submodule of middle was replaced"),
        (replace_trainable, "a submodule of Net was replaced"),
    ],
)
def test_changed_state_raises(meddle: Callable[[Net], None], what: str) -> None:
    net = Net(plain)
    frontier = found(net)
    tensors = frontier.record(BATCH)
    meddle(net)
    with pytest.raises(RuntimeError, match=what):
        frontier.replay(tensors)
    with pytest.raises(RuntimeError, match=what):
        frontier.record(BATCH)


@pytest.mark.parametrize("assign", [False, True])
def test_rewriting_equal_values_does_not_raise(assign: bool) -> None:
    net = Net(plain)
    frontier = found(net)
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=assign)
    assert_equals_whole(net, frontier)


def test_train_mode_raises_unless_it_was_checked() -> None:
    net = Net(plain)
    net.training = False
    frontier = found(net)
    tensors = frontier.record(BATCH)
    net.training = True
    with pytest.raises(RuntimeError, match="the network is in train mode, and was in eval"):
        frontier.replay(tensors)


def test_a_call_that_the_first_batch_did_not_make_raises() -> None:
    def flow(net: Any, images: Tensor) -> Tensor:
        features = net.middle(net.front(images))
        if len(images) < 3 and net.picky:
            features = net.extra(features)
        return to_head(net, net.back(features))

    net = Net(flow, extra=frozen(conv()))
    net.picky = False
    frontier = found(net)
    net.picky = True
    tensors = frontier.record(BATCH[:2])
    with pytest.raises(RuntimeError, match="the forward called extra, which it did not call on the first batch"):
        frontier.replay(tensors)


def test_records_are_not_written_to() -> None:
    net = Net(in_place)
    frontier = found(net)
    tensors = frontier.record(BATCH)
    before = [tensor.clone() for tensor in tensors]
    frontier.replay(tensors)
    assert all(map(torch.equal, tensors, before))


def test_rows_of_records_form_other_batches_in_another_precision() -> None:
    net = Net(plain).eval()
    frontier = found(net)
    (rows,) = frontier.record(torch.cat([BATCH, OTHER]))
    picked = torch.tensor([6, 1, 3])
    images = torch.cat([BATCH, OTHER])[picked]
    torch.testing.assert_close(frontier.replay([rows[picked]]), net(images))
    torch.testing.assert_close(frontier.replay([rows[picked].bfloat16()]), net(images), rtol=0.05, atol=0.05)


def test_shapes_are_checked() -> None:
    frontier = found(Net(plain))
    with pytest.raises(ValueError, match=r"got tensors of shape \(4, 3\); pass .* \('B', 3, 8, 8\) for B images"):
        frontier.replay([torch.zeros(4, 3)])
    with pytest.raises(ValueError, match=r"middle returns a tensor of shape \(4, 3, 16, 16\)"):
        frontier.record(torch.randn(4, 3, 16, 16))


@pytest.mark.long
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_two_processes(tmp_path: Path) -> None:
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKER), str(rank), "2", str(tmp_path / "store")]
            with log.open("w") as opened:
                processes.append(subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT))
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert statuses == [0, 0], "\n".join(log.read_text() for log in logs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.9's own
def test_compiled() -> None:
    torch.compiler.reset()
    net = Net(plain)
    frontier = found(net)
    compiled = torch.compile(frontier.rest, backend="aot_eager")
    tensors = frontier.record(OTHER)
    torch.testing.assert_close(step(net, lambda: compiled(*tensors)), step(net, lambda: frontier.replay(tensors)))
    net.training = False
    torch.testing.assert_close(compiled(*tensors), net(OTHER))


def test_the_rest_has_the_mode_of_the_network() -> None:
    model = FineTuneModel(Net(plain).front, nn.Sequential(nn.Flatten(), nn.Linear(192, 2))).freeze_backbone().train()
    frontier = found(model)
    frontier.rest.eval()
    assert not model.training
    frontier.rest.train()
    assert model.training
    assert not model.backbone.training
