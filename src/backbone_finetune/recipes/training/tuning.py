"""Phases for a number of images: the head first, then the last layer groups, then everything."""

from backbone_finetune import FineTuneModel

from .phases import Phase

__all__ = ["tuning_phases"]

IMAGES_SEEN = 2500  # by each phase that trains layers
FEWEST_EPOCHS, MOST_EPOCHS = 3, 10
HEAD_RATE, LAST_RATE, ALL_RATE = 1e-3, 3e-4, 1e-4


def tuning_phases(num_images: int, model: FineTuneModel) -> tuple[Phase, ...]:
    """Return phases that train the head, then the last third of the layer groups too, then everything.

    The order is that of LP-FT (Kumar et al. 2022): a head that fits first, so that the steps of a random head do not
    distort the backbone. Lengths follow from the number of images, as in BiT's HyperRule (Kolesnikov et al. 2020):
    each phase that trains layers sees about 2,500 images, in 3 to 10 epochs. Its rates fall along a cosine, the
    backbone's from 3e-4 for the last groups and from 1e-4 for everything. On few images this is
    better than a head alone, and not than plain fine-tuning (benchmarks/results/tuning.md).

    >>> model = FineTuneModel.from_timm("test_resnet", num_classes=2)
    >>> [(phase.epochs, phase.trainable_groups) for phase in tuning_phases(100, model)]
    [(30, 0), (10, 2), (10, 5)]
    >>> [(phase.epochs, phase.trainable_groups) for phase in tuning_phases(100_000, model)]
    [(30, 0), (3, 2), (3, 5)]

    Args:
        num_images: The number of training images.
        model: Its layer groups are counted.
    """
    groups = len(model.layer_groups)
    epochs = min(max(round(IMAGES_SEEN / num_images), FEWEST_EPOCHS), MOST_EPOCHS)
    last = -(-groups // 3)
    steps = [(last, LAST_RATE), (groups, ALL_RATE)] if last < groups else [(groups, ALL_RATE)]
    return (
        Phase(epochs=30),
        *(
            Phase(
                epochs=epochs,
                trainable_groups=count,
                lr=HEAD_RATE,
                backbone_lr=rate,
                weight_decay=0.01,
                warmup_epochs=1,
                cosine=True,
            )
            for count, rate in steps
        ),
    )
