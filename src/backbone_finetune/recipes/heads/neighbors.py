"""Classify features by their nearest neighbours among those of the training images, without any training."""

import torch
from pydantic import SkipValidation
from torch import Tensor
from torch.nn.functional import normalize, one_hot
from torch.utils.data import TensorDataset

from ..checking import Above0, Positive, validated
from .grid import check_features

CHUNK = 1024  # images whose similarities to all training images are in memory at once


@validated
def predict_neighbors(
    train: SkipValidation[TensorDataset],
    features: Tensor,
    *,
    num_classes: Positive,
    neighbors: Positive = 20,
    temperature: Above0 = 0.07,
) -> Tensor:
    """Predict classes by a weighted vote of the nearest training images, as in DINO (Caron et al. 2021, section 3.1).

    The similarity is the cosine, and the vote of a neighbour ``exp(similarity / temperature)``. It says how well the
    features separate the classes: there is nothing to train and no rate to choose.

    >>> train = TensorDataset(torch.eye(2), torch.tensor([0, 1]))
    >>> predict_neighbors(train, torch.tensor([[3.0, 0.1]]), num_classes=2).argmax(1)
    tensor([0])

    Args:
        train: The features ``(N, D)`` and classes ``(N,)`` of the training images, from `extract_features`. Those of
            unreadable images are left out.
        features: Features to classify, ``(M, D)``.
        num_classes: The number of classes.
        neighbors: How many neighbours vote, all if there are fewer.
        temperature: The temperature of the votes.

    Returns:
        The shares of the votes, ``(M, num_classes)``.

    Raises:
        ValueError: a number or a class is out of range, there are no training images, or they have several tensors of
            features.
    """
    train = check_features("train", train, num_classes)
    if len(train.tensors) != 2 or train.tensors[0].ndim != 2:
        shapes = [tuple(tensor.shape[1:]) for tensor in train.tensors[:-1]]
        raise ValueError(f"each image has features of shapes {shapes}; neighbours are found among vectors (N, D)")
    known, votes = normalize(train.tensors[0].float()), one_hot(train.tensors[1].long(), num_classes).float()
    shares = []
    for chunk in torch.split(normalize(features.float()), CHUNK):
        similarity, nearest = (chunk @ known.T).topk(min(neighbors, len(known)))
        weights = (similarity / temperature).softmax(1)
        shares.append(torch.einsum("mk,mkc->mc", weights, votes[nearest]))
    return torch.cat(shares)
