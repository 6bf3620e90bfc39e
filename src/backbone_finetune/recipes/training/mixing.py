"""Mixup and CutMix: the images of a step are mixed in pairs, and their targets alike, by timm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from ..data.images import is_read
from ..data.loading import seeded
from ..objectives.kinds import MultiLabel, SingleLabel, SoftLabels
from ..objectives.objective import Objective
from .phases import Phase


@dataclass(frozen=True)
class Mixing:
    """Mixes the batches of a phase.

    Args:
        mixup: timm's, which draws from NumPy's generator.
        objective: That of mixed targets, which are rows of floats.
    """

    mixup: Mixup
    objective: Objective

    def mix(self, batch: Sequence[Tensor], *, seed: str) -> tuple[Tensor, Tensor]:
        """Mix image i of n with image n - 1 - i; return images and rows of targets, ``(B, K)``.

        What is drawn depends on the seed alone. In an odd batch the last image is not mixed. An image counts only if
        both images of its pair could be read.

        >>> images, targets = torch.eye(4).reshape(4, 1, 2, 2), torch.tensor([0, 1, 1, 1])
        >>> mixed, rows = make_mixing(Phase(mixup=1.0), SingleLabel(), 2).mix((images, targets), seed="0 1 2")
        >>> rows.sum(1), (mixed.flatten(1) > 0).sum(1)
        (tensor([1., 1., 1., 1.]), tensor([2, 2, 2, 2]))
        """
        images, targets = batch[0], batch[-1]
        if len(batch) != 2 or images.ndim != 4 or not images.is_floating_point():
            given = ", ".join(f"{tensor.dtype} of shape {tuple(tensor.shape)}" for tensor in batch[:-1])
            raise ValueError(f"mixup and cutmix take one input, float images (B, C, H, W); the dataset gives {given}")
        read, even = is_read(targets), len(images) - len(images) % 2
        known = targets.nan_to_num() if targets.is_floating_point() else targets.clamp(min=0)
        with seeded(seed):
            mixed, rows = self.mixup(images[:even], known[:even])
        read = torch.cat((read[:even] & read[:even].flip(0), read[even:]))
        if even < len(images):  # timm takes an even number
            fixed = self.mixup
            last = mixup_target(known[even:], fixed.num_classes, 1.0, fixed.label_smoothing, fixed.multi_label)  # type: ignore[no-untyped-call]
            mixed, rows = torch.cat((mixed, images[even:])), torch.cat((rows, last))
        return mixed, rows.where(read[:, None], torch.nan)


def make_mixing(phase: Phase, objective: Objective, outputs: int | None) -> Mixing | None:
    """Return the mixing of a phase, or None; raise ValueError for targets that cannot be mixed.

    Args:
        phase: Its ``mixup`` and ``cutmix`` are timm's alphas.
        objective: Of the targets as they are.
        outputs: The number of classes or labels.
    """
    if not (phase.mixup or phase.cutmix):
        return None
    if isinstance(objective, SingleLabel) and objective.class_weights is None and objective.loss is None:
        mixed: Objective = SoftLabels()
    elif isinstance(objective, SoftLabels | MultiLabel):
        mixed = objective
    else:
        raise ValueError(
            "mixup and cutmix give targets between classes, so they work with SingleLabel() without class_weights and "
            f"loss, SoftLabels and MultiLabel; the objective is {objective}; pass mixup=0 and cutmix=0"
        )
    is_class = isinstance(objective, SingleLabel)
    return Mixing(
        Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=phase.mixup,
            cutmix_alpha=phase.cutmix,
            label_smoothing=objective.label_smoothing if isinstance(objective, SingleLabel) else 0.0,
            num_classes=outputs,
            multi_label=not is_class,
        ),
        mixed,
    )
