"""What a frozen phase trains on: features where its images are the same in each epoch, else the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import make_folder
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import Phase, TrainerConfig, fine_tune, make_accelerator
from backbone_finetune.recipes.data.determinism import find_randomness
from backbone_finetune.recipes.data.images import ImageDataset, find_images

STILL: Any = create_transform(8)
RANDOM: Any = create_transform(8, is_training=True)
TENSORS = TensorDataset(torch.ones(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))


class Own(Dataset[tuple[Tensor, int]]):
    """Images with noise or without; what it says of that, its subclasses say."""

    noise = 0.0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(3, 8, 8) + self.noise * torch.rand(3, 8, 8), index % 2


class Stating(Own):
    def __init__(self, **stated: Any) -> None:
        vars(self).update(stated)


class Shaken(Own):
    noise = 1.0
    transform = staticmethod(torch.rand_like)


class Still(Own):
    transform = None


class Noisy(Subset[Any]):
    """A subclass that draws, as one that has a transform for one part of a split does."""

    def __getitem__(self, index: Any) -> Any:
        image, target = self.dataset[self.indices[index]]
        return image + torch.rand(1), target

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class NoisyTensors(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor + torch.rand(1) for tensor in super().__getitem__(index))


class Around(Dataset[Any]):
    """Draws, around a dataset that says of itself that it does not, and for which it speaks in all else."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        image, target = self.dataset[index]
        return image + torch.rand(1), target


@pytest.mark.parametrize(
    "data",
    [
        Shaken(),
        Own(),
        Around(Still()),
        Subset(Shaken(), [0, 1]),
        random_split(Shaken(), [2, 2])[0],
        ConcatDataset([TENSORS, Shaken()]),
        Subset(ConcatDataset([Subset(Shaken(), [0, 1]), TENSORS]), [0]),
        Noisy(TENSORS, [0, 1]),
        NoisyTensors(*TENSORS.tensors),
        Stating(transform=None, transforms=RANDOM),
        Stating(transform=STILL, target_transform=torch.rand_like),
        Subset(Stating(transforms=RANDOM), [0]),
    ],
)
def test_what_may_draw_is_not_frozen_at_what_it_drew_first(data: Any) -> None:
    assert find_randomness(data) is not None


@pytest.mark.parametrize(
    "data",
    [
        TENSORS,
        [(torch.ones(3, 8, 8), 0)],
        ((torch.ones(3, 8, 8), 0),),
        Still(),
        Stating(transform=STILL),
        Stating(transforms=STILL, target_transform=None),
        random_split(TENSORS, [3, 1])[0],
        Subset(ConcatDataset([Still(), TENSORS]), [0, 5]),
    ],
)
def test_what_shows_the_same_each_time_is_known(data: Any) -> None:
    assert find_randomness(data) is None


def test_datasets_of_image_folders_go_by_their_transform(tmp_path: Path) -> None:
    make_folder(tmp_path, per_class=1)
    for transform, known in ((STILL, True), (RANDOM, False)):
        assert (find_randomness(ImageDataset(find_images(tmp_path), transform)) is None) is known
        assert (find_randomness(ImageFolder(str(tmp_path), transform)) is None) is known
    halves = transforms.Compose([transforms.Resize(8), transforms.RandomHorizontalFlip()])
    assert find_randomness(ImageFolder(str(tmp_path), STILL, torch.rand_like)) is not None  # type: ignore[arg-type]
    assert find_randomness(Subset(ImageFolder(str(tmp_path), halves), [0])) is not None


@pytest.mark.parametrize(("kind", "epochs_seen"), [(Shaken, 3), (Own, 3), (Still, 1)])
def test_a_part_of_a_random_dataset_is_drawn_anew_in_each_epoch(kind: type[Own], epochs_seen: int) -> None:
    model = FineTuneModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Linear(4, 2))
    passes: list[None] = []
    model.backbone.register_forward_hook(lambda *_: passes.append(None))
    train, _ = random_split(kind(), [2, 2])
    loop = TrainerConfig(make_accelerator(torch.device("cpu")), batch_size=2, show_progress=False)
    fine_tune(model, train, TENSORS, [Phase(epochs=3)], loop)
    assert len(passes) == epochs_seen * (1 + 2)
