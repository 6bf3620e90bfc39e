"""A process that test_frontier.py starts: python frontier_worker.py RANK WORLD STORE_FILE."""

from __future__ import annotations

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import Frontier, find_frontier


def train(model: FineTuneModel, network: nn.Module, batches: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the parameters and buffers after a few steps."""
    optimizer = torch.optim.SGD(model.param_groups(lr=0.01), momentum=0.9)
    for inputs in batches:
        network.train()
        optimizer.zero_grad()
        network(*inputs).square().sum().backward()
        optimizer.step()
    return [*model.parameters(), *model.buffers()]


def main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    torch.manual_seed(0)
    model = FineTuneModel.from_timm("test_resnet", num_classes=5).freeze_backbone(trainable_groups=2).train()
    whole = copy.deepcopy(model)
    torch.manual_seed(1 + rank)
    batches = [(torch.randn(4, 3, 32, 32),) for _ in range(3)]
    frontier = find_frontier(model, *batches[0])
    assert isinstance(frontier, Frontier), frontier
    wrapped = DistributedDataParallel(frontier.rest)
    cached = train(model, wrapped, [frontier.record(*batch) for batch in batches])
    expected = train(whole, DistributedDataParallel(whole), batches)
    for one, other in zip(cached, expected, strict=True):
        torch.testing.assert_close(one, other)
        mine = one.detach().clone()
        dist.broadcast(mine, src=0)
        assert torch.equal(mine, one) or not one.requires_grad  # running statistics differ between processes
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
