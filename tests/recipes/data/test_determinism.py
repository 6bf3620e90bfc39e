"""What a frozen phase trains on: features where its images are the same in each epoch, else the images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import make_folder
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils._pytree import tree_structure
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

from backbone_finetune import FineTuneModel
from backbone_finetune.recipes import ImageDataset, Phase, TrainerConfig, find_images, fine_tune, make_accelerator
from backbone_finetune.recipes.data.fingerprint import find_randomness
from backbone_finetune.recipes.features.dataset import Features

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
        Features(TENSORS.tensors, tree_structure(0)),
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
    fine_tune(model, train, TENSORS, [Phase(epochs=3, lr=1e-3)], loop)
    assert len(passes) == epochs_seen * (1 + 2)


class Augmenting(Own):
    """The usual dataset of one's own: no transform was given, and it draws all the same."""

    def __init__(self, noise: float, transform: Any = None) -> None:
        self.noise, self.transform = noise, transform


def test_a_dataset_that_says_it_has_no_transform_is_read_twice() -> None:
    before = torch.get_rng_state()
    reason = find_randomness(Augmenting(noise=1.0))
    assert reason == "item 0 of Augmenting was not the same when it was read twice"
    assert torch.equal(torch.get_rng_state(), before)
    assert find_randomness(Augmenting(noise=0.0)) is None


def test_a_reason_is_the_same_in_every_run() -> None:
    """The history of a run has it, and repr has an address."""
    for transform, text in (
        (Augmenting(noise=1.0).__getitem__, "<bound method Own.__getitem__ of"),
        (object(), "<object"),
    ):
        reason = str(find_randomness(Augmenting(noise=0.0, transform=transform)))
        assert reason.startswith(text)
        assert "0x" not in reason


def train(backbone: nn.Module, classifier: nn.Module, data: Any, epochs: int = 2) -> FineTuneModel:
    model = FineTuneModel(backbone, classifier)
    loop = TrainerConfig(
        make_accelerator(torch.device("cpu")), batch_size=2, show_progress=False, autocast_features=False
    )
    fine_tune(model, data, data, [Phase(epochs=epochs, lr=0.1)], loop)
    return model


def test_where_features_are_not_cached_a_line_says_why(caplog: pytest.LogCaptureFixture) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    for data, reason in (
        (Own(), "Own may draw random numbers when it is read; give it transform = None if it does not"),
        (Augmenting(noise=1.0), "item 0 of Augmenting was not the same when it was read twice"),
        (Shaken(), "is not known to give the same tensor for the same image each time"),
    ):
        caplog.clear()
        train(flat, nn.Linear(4, 2), data, epochs=1)
        [message] = caplog.messages
        assert message.startswith("features are not cached, and the whole model runs in every step: ")
        assert reason in message
    caplog.clear()
    train(flat, nn.Linear(4, 2), TENSORS)
    assert caplog.messages == []


class Giving(nn.Module):
    """A backbone of one or two inputs whose output is built by a function."""

    def __init__(self, build: Any) -> None:
        super().__init__()
        self.layer, self.build = nn.Linear(3, 4), build

    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        features = self.layer(image if other is None else image + other)
        return self.build(features)


class Taking(nn.Module):
    """A classifier that is particular about what it gets."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self.layer, self.take = nn.Linear(4, 2), take

    def forward(self, features: Any) -> Tensor:
        return self.layer(self.take(features))


def pick(kind: type, count: int) -> Any:
    def take(features: Any) -> Any:
        assert (type(features), len(features)) == (kind, count)
        return features["a"] if kind is dict else features[0]

    return take


@pytest.mark.parametrize(
    ("build", "take"),
    [
        (lambda x: x, lambda x: x),
        (lambda x: (x,), pick(tuple, 1)),
        (lambda x: (x, x.sum(1)), pick(tuple, 2)),
        (lambda x: [x, x.sum(1)], pick(list, 2)),
        (lambda x: {"a": x, "b": (x, x)}, pick(dict, 2)),
        (lambda x: (x, "no tensor"), pick(tuple, 2)),  # which is not cached
        (lambda x: (x, x.sum()), pick(tuple, 2)),
    ],
)
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_frozen_phase_takes_what_an_unfrozen_one_does(build: Any, take: Any, inputs: int) -> None:
    """The same rows as a dataset that may draw, for which the whole model runs in every step."""
    torch.manual_seed(0)
    data = TensorDataset(*(torch.randn(5, 3) for _ in range(inputs)), torch.tensor([0, 1, 0, 1, 1]))
    trained = []
    for rows in (data, Noiseless(data)):
        torch.manual_seed(1)
        trained.append(train(Giving(build), Taking(take), rows))
    torch.testing.assert_close(trained[0].state_dict(), trained[1].state_dict())


class Noiseless(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


IMAGES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(TENSORS), r"train is a DataLoader; pass its dataset: train\.dataset"),
        ([], r"len\(train\) = 0: expected one image or more"),
        ([{"image": torch.ones(3), "label": 1}], r"the loader gave a dict of image, label; the dataset must return \("),
        ([(torch.ones(3), "cat")], r"the loader gave a list of 2; the dataset must return \(input, target\)"),
        (
            [(torch.ones(3), torch.ones(3), torch.ones(3), 0)],
            r"train: the model cannot run on the first row's input, \(3,\) float32, .* positional arguments",
        ),
        (
            TensorDataset(IMAGES, torch.rand(4, 2)),
            r"train: the targets are float32 of shape \(2,\) per image; pass",
        ),
        (
            TensorDataset(IMAGES, torch.ones(4)),
            r"train: the targets are float32 of shape \(\) per image; pass",
        ),
        ([(torch.ones(3), 0.5)], r"train: the targets are float64 of shape \(\) per image; pass class indices"),
        (
            TensorDataset(IMAGES, torch.arange(4)),
            r"train: target 2 is outside the 2 classes of the classifier",
        ),
        (TensorDataset(IMAGES, torch.arange(4) - 1), r"train: target -1 is outside the 2 classes"),
        ([(torch.ones(3), 0), (torch.ones(3), 7)], r"train: target 7 is outside the 2 classes"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused_before_the_first_step(data: Any, message: str) -> None:
    model = FineTuneModel(Giving(lambda x: x), nn.Linear(4, 2))
    loop = TrainerConfig(make_accelerator(torch.device("cpu")), show_progress=False)
    before = model.classifier.weight.clone()
    with pytest.raises(ValueError, match=message):
        fine_tune(model, data, TensorDataset(IMAGES, torch.zeros(4).long()), [Phase()], loop)
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_small_integers_are_class_indices(dtype: torch.dtype) -> None:
    targets = torch.tensor([0, 1, 1, 0])
    trained = []
    for given in (targets, targets.to(dtype)):
        for rows in (TensorDataset(IMAGES, given), Noiseless(TensorDataset(IMAGES, given))):
            torch.manual_seed(1)
            trained.append(train(Giving(lambda x: x), nn.Linear(4, 2), rows))
    for other in trained[1:]:
        torch.testing.assert_close(other.state_dict(), trained[0].state_dict())
