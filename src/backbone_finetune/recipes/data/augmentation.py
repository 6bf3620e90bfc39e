"""Random changes of training images, by timm's training transform."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from timm.data.transforms_factory import create_transform
from torch import Tensor
from typing_extensions import Self

from ..checking import Share
from .bands import Picture


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Augmentation:
    """Arguments of timm's training transform, ``timm.data.create_transform(is_training=True)``, which draws each image.

    ``Augmentation.LIGHT``, the default, is a random crop and a mirror; ``Augmentation.STRONG`` adds RandAugment
    (Cubuk et al. 2020) and random erasing (Zhong et al. 2020), with the usual values of timm's recipes.

    >>> Augmentation.LIGHT == Augmentation(scale=(0.35, 1.0), hflip=0.5), Augmentation.STRONG.re_prob
    (True, 0.25)

    Args:
        scale: The smallest and largest area of a random crop, as shares of the image.
        hflip: The probability of a mirror image.
        vflip: The probability of an image upside down.
        color_jitter: The largest relative change of brightness, contrast and saturation; None for no change.
        auto_augment: A policy of timm, such as "rand-m9-mstd0.5-inc1"; with it, timm ignores ``color_jitter``.
        re_prob: The probability that a random rectangle is erased.

    Raises:
        ValueError: a value is of the wrong type or out of range, or timm has no such policy.
    """

    LIGHT: ClassVar["Augmentation"]
    STRONG: ClassVar["Augmentation"]

    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: Share | None = None
    auto_augment: str | None = None
    re_prob: Share = 0.0

    def make_transform(self, data_config: Mapping[str, Any]) -> Callable[[Picture], Tensor]:
        """Return timm's training transform for a network's data config.

        Raises:
            ValueError: the augmentation changes colours, and the network does not take three channels.
        """
        channels = data_config["input_size"][0]
        if channels != 3 and (self.color_jitter is not None or self.auto_augment is not None):
            raise ValueError(
                f"color_jitter and auto_augment change colours of three channels, and the images have {channels}; "
                "augment them without these, as light does"
            )
        training = {"is_training": True, **asdict(self)}
        transform: Callable[[Picture], Tensor] = create_transform(**{**data_config, **training})
        return transform

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale = {self.scale}: expected the smallest area first")
        if self.auto_augment is not None:
            try:  # timm asserts, and looks policies up in its own table
                create_transform(32, is_training=True, auto_augment=self.auto_augment)
            except (AssertionError, KeyError, ValueError) as error:
                raise ValueError(
                    f"auto_augment = {self.auto_augment!r} is no policy of timm; such are rand-m9-mstd0.5-inc1, "
                    "augmix-m3-w3, original and 3a"
                ) from error
        return self


Augmentation.LIGHT = Augmentation()
Augmentation.STRONG = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)

# The names in phases.toml and on the command line.
AUGMENTATIONS = {"none": None, "light": Augmentation.LIGHT, "strong": Augmentation.STRONG}
