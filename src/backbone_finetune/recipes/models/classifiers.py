"""The classifiers that a model file can hold, described by their layers and sizes: no code of a file is run."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

from pydantic import Field
from torch import nn

from ..checking import Schema, Share

Head = Literal["linear", "batchnorm-linear", "mlp"]
MOST_LAYERS = 16
Size = Annotated[int, Field(ge=1, le=2**20)]

KINDS = "a Linear, or an nn.Sequential of Linear, BatchNorm1d, LayerNorm, GELU, ReLU and Dropout"


class _Layer(Schema):
    """The arguments of a layer of ``torch.nn``, in their order, below its name."""

    kind: str

    def build(self) -> nn.Module:
        """Build the layer, with random weights."""
        layer, *arguments = self.model_dump().values()
        return cast(nn.Module, getattr(nn, layer)(*arguments))


class LinearLayer(_Layer):
    """``nn.Linear``."""

    kind: Literal["Linear"]
    in_features: Size
    out_features: Size
    bias: bool


class BatchNormLayer(_Layer):
    """``nn.BatchNorm1d``, with running statistics."""

    kind: Literal["BatchNorm1d"]
    num_features: Size
    eps: Share
    momentum: Share | None
    affine: bool


class LayerNormLayer(_Layer):
    """``nn.LayerNorm`` over the features, with weight and bias."""

    kind: Literal["LayerNorm"]
    num_features: Size
    eps: Share


class DropoutLayer(_Layer):
    """``nn.Dropout``."""

    kind: Literal["Dropout"]
    p: Share


class ActivationLayer(_Layer):
    """``nn.GELU`` or ``nn.ReLU``."""

    kind: Literal["GELU", "ReLU"]


Layer = Annotated[
    LinearLayer | BatchNormLayer | LayerNormLayer | DropoutLayer | ActivationLayer, Field(discriminator="kind")
]


class ClassifierDescription(Schema):
    """The layers of an ``nn.Sequential``, from the features to the outputs."""

    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MOST_LAYERS)]

    def build(self) -> nn.Sequential:
        """Build the classifier, with random weights."""
        return nn.Sequential(*(layer.build() for layer in self.layers))

    def with_outputs(self, count: int) -> "ClassifierDescription":
        """Return the description with another number of outputs."""
        *layers, last = self.layers
        return ClassifierDescription(layers=(*layers, last.model_copy(update={"out_features": count})))


def describe_classifier(classifier: nn.Module) -> dict[str, Any] | None:
    """Describe an ``nn.Sequential`` as the metadata of a model file; None for any other module.

    >>> describe_classifier(nn.Sequential(nn.GELU(), nn.Linear(4, 2)))["layers"][1]
    {'kind': 'Linear', 'in_features': 4, 'out_features': 2, 'bias': True}
    >>> describe_classifier(nn.Linear(4, 2)), describe_classifier(nn.Sequential(nn.Linear(4, 2), nn.Softmax(1)))
    (None, None)
    """
    if type(classifier) is not nn.Sequential:
        return None
    layers = tuple(_describe_layer(layer) for layer in classifier)
    return None if None in layers else {"layers": layers}


def _describe_layer(layer: Any) -> dict[str, Any] | None:
    kind = type(layer)
    entries: dict[str, Any] | None = None
    if kind is nn.Linear:
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
        entries = {**sizes, "bias": layer.bias is not None}
    elif kind is nn.BatchNorm1d and layer.track_running_stats:
        entries = {name: getattr(layer, name) for name in ("num_features", "eps", "momentum", "affine")}
    elif kind is nn.LayerNorm and len(layer.normalized_shape) == 1 and layer.bias is not None:
        entries = {"num_features": layer.normalized_shape[0], "eps": layer.eps}
    elif kind is nn.Dropout:
        entries = {"p": float(layer.p)}
    elif kind is nn.ReLU or (kind is nn.GELU and layer.approximate == "none"):
        entries = {}
    return None if entries is None else {"kind": kind.__name__, **entries}


def choose_classifier(head: Head, num_classes: int) -> Callable[[int], nn.Module] | None:
    """Return a function from the feature width to a classifier; None for a linear layer.

    "batchnorm-linear" is that of MAE's linear evaluation (He et al. 2022, appendix A.1): the features are normalized
    without a learned scale. "mlp" has one hidden layer of the width of the features.
    """
    if head == "batchnorm-linear":
        return lambda width: nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False), nn.Linear(width, num_classes))
    if head == "mlp":
        return lambda width: nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_classes))
    return None
