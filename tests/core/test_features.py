"""Features that the classifier cannot take raise an error with the reason; other errors pass through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backbone_finetune import FineTuneModel

INPUTS = torch.ones(2, 4)


class Returns(nn.Module):
    """A backbone that returns `convert(features)`."""

    def __init__(self, convert: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.convert = convert

    def forward(self, x: Tensor) -> object:
        return self.convert(self.layer(x))


class Outputs(dict[str, Tensor]):
    """Like a ModelOutput of transformers."""


@pytest.mark.parametrize("classifier", [nn.Linear(4, 2), nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))])
@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda y: [y, y], r"returned a list of 2, and .* takes one tensor; wrap the backbone in a module"),
        (lambda y: {"out": y}, r"returned a dict \(out\), and .* takes one tensor"),
        (lambda y: Outputs(pooler_output=y), r"returned a Outputs \(pooler_output\).*outputs\.pooler_output"),
        (lambda y: y.bfloat16(), r"features are torch\.bfloat16 and the classifier is torch\.float32; .*autocast"),
    ],
)
def test_features_that_a_classifier_cannot_take_raise(
    classifier: nn.Module, convert: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FineTuneModel(Returns(convert), classifier)(INPUTS)


@pytest.mark.parametrize("classifier", [nn.Linear(4, 2), nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))])
def test_a_wrong_width_raises(classifier: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"returned features of shape \(B, 3\), and the classifier \(\w+\) takes \(B, 4\)"
    ):
        FineTuneModel(Returns(lambda y: y[:, :3]), classifier)(INPUTS)


def test_a_classifier_that_takes_several_tensors_gets_them() -> None:
    class Takes(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return features["out"]

    assert FineTuneModel(Returns(lambda y: {"out": y}), Takes())(INPUTS).shape == (2, 4)
    mixed = FineTuneModel(Returns(lambda y: y.bfloat16()), nn.Linear(4, 2))
    with torch.autocast("cpu"):
        assert mixed(INPUTS).dtype == torch.bfloat16


def test_other_errors_of_the_classifier_are_not_changed() -> None:
    class Fails(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match=r"^a fault of its own$"):
        FineTuneModel(Returns(lambda y: y), Fails())(INPUTS)
