"""Run a frozen backbone once: what its classifier will see of every picture."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from backbone_finetune import FineTuneModel

__all__ = ["extract_features", "trains"]


def trains(module: nn.Module) -> bool:
    """Say whether any parameter of a module trains.

    >>> trains(nn.Linear(2, 2)), trains(nn.Linear(2, 2).requires_grad_(False)), trains(nn.Flatten())
    (True, False, False)
    """
    return any(parameter.requires_grad for parameter in module.parameters())


@torch.no_grad()
def extract_features(
    model: FineTuneModel,
    pictures: Dataset[tuple[Tensor, int]],
    *,
    batch_size: int,
    device: torch.device,
    title: str | None = None,
) -> TensorDataset:
    """Run a frozen backbone over pictures once: a dataset of ``(features, target)`` pairs, in order.

    A frozen backbone computes the same features in every epoch, so a classifier that trains on them trains as it
    would above the backbone, but without its cost. They lie in memory, on the CPU, ``4 * N * D`` bytes of float32.
    With a ``title``, a progress bar of that name is shown.

    >>> model = FineTuneModel(nn.Linear(3, 4), nn.Linear(4, 2)).freeze_backbone()
    >>> pictures = [(torch.ones(3), 0), (torch.zeros(3), 1), (torch.ones(3), 1)]
    >>> features, targets = extract_features(model, pictures, batch_size=2, device=torch.device("cpu")).tensors
    >>> tuple(features.shape), targets
    ((3, 4), tensor([0, 1, 1]))

    Raises:
        ValueError: part of the backbone trains, so its features will not stay what they are.
    """
    if trains(model.backbone):
        raise ValueError("features of a backbone that trains change with every step; call freeze_backbone() first")
    model.eval()
    features: list[Tensor] = []
    targets: list[Tensor] = []
    batches = DataLoader(pictures, batch_size)
    for inputs, batch_targets in tqdm(batches, desc=title, unit="batch", disable=title is None):
        # A copy, since a ViT's features are a view that would keep all of its tokens in memory.
        features.append(model.backbone(inputs.to(device)).cpu().clone())
        targets.append(batch_targets)
    return TensorDataset(torch.cat(features), torch.cat(targets))
