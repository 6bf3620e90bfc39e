"""What a phase trains on: pictures, or, where the backbone is frozen and shows the same each time, its features."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets.vision import StandardTransform  # it comes with timm

from backbone_finetune import FineTuneModel

from .feature_store import remove_store
from .features import FeatureCache, extract_features
from .fingerprints import is_deterministic
from .randomness import own_randomness

__all__ = ["gather_features", "repeats"]

GATHERED_ROWS = 4096
# What torchvision's datasets, and most others, call what they do to a picture and its target.
TRANSFORMS = ("transform", "transforms", "target_transform")


def repeats(data: Dataset[Any]) -> bool:
    """Say whether a dataset is known to show the same in every epoch.

    >>> repeats(TensorDataset(torch.ones(1))), repeats(Subset([(torch.rand, 0)], [0]))
    (True, True)

    A dataset tells by ``transform`` (``transforms``, ``target_transform``): None, or one of torchvision or timm that is
    known to draw nothing. Tensors, lists and tuples need not tell; a dataset of other datasets shows what they show.
    Any other, a class of your own that has no such attribute, may draw in its ``__getitem__``, and counts as random.
    """
    stated = [getattr(data, name) for name in TRANSFORMS if hasattr(data, name)]
    if not all(draws_nothing(transform) for transform in stated):
        return False
    if isinstance(data, Subset) and not repeats(data.dataset):
        return False
    if isinstance(data, ConcatDataset) and not all(repeats(part) for part in data.datasets):
        return False
    # A subclass may do anything in __getitem__, as one of Subset that has a transform of its own does.
    return bool(stated) or type(data) in {TensorDataset, Subset, ConcatDataset, list, tuple}


def draws_nothing(transform: Any) -> bool:
    """Say whether what a dataset names as a transform is none, or known to give the same each time.

    >>> draws_nothing(None), draws_nothing(torch.rand_like)
    (True, False)
    """
    if type(transform) is StandardTransform:  # what torchvision's datasets make of their two others
        return draws_nothing(transform.transform) and draws_nothing(transform.target_transform)
    return transform is None or is_deterministic(transform)


def gather_features(
    model: FineTuneModel,
    data: Dataset[Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
    cache: FeatureCache | None = None,
    autocast: bool = True,
    title: str | None = None,
    moved: bool = False,
) -> TensorDataset:
    """Run a frozen backbone once over a dataset: each process over its part, and all of them get all features.

    See `extract_features`; this adds the processes, and draws nothing from any random generator. A cache of a backbone
    that has ``moved`` since then, as it should, is replaced without a word.

    >>> model = FineTuneModel(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).freeze_backbone()
    >>> pictures = TensorDataset(torch.ones(3, 3), torch.tensor([0, 1, 1]))
    >>> features = gather_features(model, pictures, batch_size=2, accelerator=Accelerator(cpu=True))
    >>> [tuple(tensor.shape) for tensor in features.tensors]
    [(3, 4), (3,)]
    """
    count, processes = len(data), accelerator.num_processes  # type: ignore[arg-type]  # a Dataset of no declared length
    if processes > 1:
        # Every process takes as many pictures, the first ones once more where they do not come out even.
        positions = torch.arange(accelerator.process_index, -(-count // processes) * processes, processes) % count
        data = Subset(data, positions.tolist())
        if cache is not None:
            part = f"{accelerator.process_index}-of-{processes}"
            folder, fingerprint = Path(f"{cache.folder}-{part}"), f"{cache.data_fingerprint} {part}"
            cache = FeatureCache(folder, fingerprint, memory_share=cache.memory_share)
    if cache is not None and moved:
        remove_store(cache.folder)
    with own_randomness():
        features = extract_features(
            model,
            DataLoader(data, batch_size),
            device=accelerator.device,
            cache=cache,
            autocast=autocast,
            title=title,
        )
    if processes == 1:
        return features
    return TensorDataset(*(gather_rows(tensor, accelerator)[:count] for tensor in features.tensors))


def gather_rows(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """Gather what every process has of a dataset, dealt out one by one, and put it back in order.

    >>> gather_rows(torch.arange(3), Accelerator(cpu=True))
    tensor([0, 1, 2])
    """
    whole: list[Tensor] = []
    for rows in torch.split(tensor, GATHERED_ROWS):
        gathered = accelerator.gather(rows.to(accelerator.device)).cpu()
        dealt = gathered.unflatten(0, (accelerator.num_processes, len(rows))).transpose(0, 1)
        whole.append(dealt.flatten(0, 1))
    return torch.cat(whole)
