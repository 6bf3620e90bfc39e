"""``backbone-finetune inspect --trainable-groups``: what can be cached, and what each epoch still computes."""

from collections.abc import Callable

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from backbone_finetune import FineTuneModel
from backbone_finetune.frontier import NoFrontier, find_frontier

from ..models.weights import create_network
from ..rng import preserve_rng_state

__all__ = ["inspect_frontier"]

IMAGES = 3  # the minimum of find_frontier


def inspect_frontier(architecture: str, trainable_groups: int) -> str:
    """Describe what is cached for each image while the last layer groups train, or why nothing is.

    The network has random weights, and runs on the CPU on random images of its own size.

    >>> print(inspect_frontier("test_resnet", 1))
    --trainable-groups 1: computed once for each image, and cached:
      backbone.layer3: 192 x 10 x 10 float32, 76.8 kB per image
    each epoch then computes 6.5% of the forward and 4.3% of the backward operations of training all
    """
    with preserve_rng_state():
        model = FineTuneModel.from_timm(create_network(architecture), num_classes=1).train()
        model.freeze_backbone(trainable_groups=trainable_groups)
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        images = torch.randn(IMAGES, *config["input_size"])
        found = find_frontier(model, images)
        if isinstance(found, NoFrontier):
            return f"--trainable-groups {trainable_groups}: nothing can be cached: {found.reason}"
        tensors = found.record(images)
        cached = _count_operations(lambda: found.replay(tensors))
        model.unfreeze_backbone()
        whole = _count_operations(lambda: model(images))
    forward, back = (f"{part / max(of_all, 1):.1%}" for part, of_all in zip(cached, whole, strict=True))
    kept = [f"  {line}" for line in str(found).splitlines()]
    if len(kept) > 1:
        kept.append(f"  together {found.bytes_per_image / 1000:,.1f} kB per image")
    return "\n".join(
        [
            f"--trainable-groups {trainable_groups}: computed once for each image, and cached:",
            *kept,
            f"each epoch then computes {forward} of the forward and {back} of the backward operations of training all",
        ]
    )


def _count_operations(run: Callable[[], Tensor]) -> tuple[int, int]:
    """Count the floating-point operations of a forward pass and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()  # type: ignore[no-untyped-call]
    return forward.get_total_flops(), backward.get_total_flops()
