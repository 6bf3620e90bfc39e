"""Explain errors by running the model on the first row of a dataset."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset

from backbone_finetune import FineTuneModel

from ..data.images import ImageDataset
from ..data.targets import first_row
from ..features.frozen_pass import in_eval
from ..rng import preserve_rng_state
from ..together import OUT_OF_MEMORY


@contextmanager
def explain_errors(model: FineTuneModel, **datasets: Dataset[Any] | None) -> Iterator[None]:
    """Replace an error in the block by a ValueError if the model cannot run on the first row of a dataset.

    >>> model = FineTuneModel(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    >>> with explain_errors(model, train=[(torch.ones(2).byte(), 0)]):
    ...     model(torch.ones(1, 2).byte())
    Traceback (most recent call last):
    ...
    ValueError: train: the model cannot run on the first row's input, (2,) uint8 (...); networks of images take ...
    """
    try:
        yield
    except OUT_OF_MEMORY:  # which no row explains
        raise
    except Exception as error:
        for name, data in datasets.items():
            if data is not None and not isinstance(data, ImageDataset):
                _run_first_row(model, name, data, error)
        if "more than 1 value per channel" in str(error):  # torch's batch normalisation
            raise ValueError(
                f"a batch of one image: {error}; pass more images, a larger batch or norm_eval=True"
            ) from error
        raise


def _run_first_row(model: FineTuneModel, name: str, data: Any, error: Exception) -> None:
    with preserve_rng_state(), in_eval(model), torch.no_grad(), torch.device("cpu"):
        inputs, _ = first_row(name, data)
        device = next(model.parameters()).device
        try:
            model(*(tensor.to(device) for tensor in inputs))
        except Exception as fault:  # a forward may raise any error
            rows = ", ".join(f"{tuple(each.shape[1:])} {each.dtype}".replace("torch.", "") for each in inputs)
            raise ValueError(
                f"{name}: the model cannot run on the first row's input, {rows} ({str(fault).partition(chr(10))[0]}); "
                "networks of images take (3, H, W) float32, as the transform timm.data.create_transform(224) returns"
            ) from error
