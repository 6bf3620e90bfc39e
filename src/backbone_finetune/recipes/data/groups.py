"""Hold out images: a share of each class, or groups, such as those of one patient, which no split divides."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence

from backbone_finetune.names import shortened

from .images import LabelledFolder


def places_by_class(targets: Sequence[int]) -> dict[int, list[int]]:
    """Return the places of the images of each class, by class.

    >>> places_by_class([1, 0, 1])
    {0: [1], 1: [0, 2]}
    """
    places: dict[int, list[int]] = {target: [] for target in sorted(set(targets))}
    for place, target in enumerate(targets):
        places[target].append(place)
    return places


def deal_groups(
    groups: Sequence[str], targets: Sequence[Hashable], shares: Sequence[float], generator: random.Random
) -> list[int]:
    """Deal groups to parts so that each part has about its share of every class; return the part of each image.

    Large groups come first, each to the part that lacks its classes most, as in scikit-learn's
    ``StratifiedGroupKFold``, here for any shares. A class of at least as many groups as there are parts is in each
    part, unless its groups are needed elsewhere for other classes.

    >>> deal_groups(["ann", "ann", "bob", "cid", "cid"], [0, 0, 0, 0, 0], [0.6, 0.4], random.Random(0))
    [1, 1, 0, 0, 0]
    """
    totals, counts = Counter(targets), dict[str, Counter[Hashable]]()
    for group, target in zip(groups, targets, strict=True):
        counts.setdefault(group, Counter())[target] += 1
    undealt = Counter(target for own in counts.values() for target in own)
    held: list[Counter[Hashable]] = [Counter() for _ in shares]
    part_of: dict[str, int] = {}
    for group in sorted(generator.sample(list(counts), len(counts)), key=lambda group: -counts[group].total()):
        own = counts[group]
        without = {target: [part for part, has in enumerate(held) if not has[target]] for target in own}
        urgent = {part for target in own if undealt[target] <= len(without[target]) for part in without[target]}

        def excess(part: int, own: Counter[Hashable] = own) -> float:
            # What the group adds to the sum over parts and classes of (count - share * total)^2 / (share * total^2).
            return sum(
                n * (2 * held[part][target] + n) / (shares[part] * totals[target] ** 2) for target, n in own.items()
            )

        part_of[group] = min(sorted(urgent) or range(len(shares)), key=excess)
        held[part_of[group]].update(own)
        undealt.subtract(own.keys())
    return [part_of[group] for group in groups]


def split(folder: LabelledFolder, *, test_share: float, seed: int) -> tuple[LabelledFolder, LabelledFolder]:
    """Hold out a share of each class, drawn with ``seed``; return disjoint ``(train, test)``.

    Each class has at least one image in both parts. The draw depends only on the order of the images, so the
    same folder has the same split on every machine. Raises ValueError for a class of one image. If targets are rows,
    the share is of all images. Images of a group are in one part (`deal_groups`), and the shares then as near as
    groups allow.
    """
    generator = random.Random(seed)
    targets, names = folder.by_class()
    held_out: set[int] = set()
    if folder.groups is None:
        for target, members in places_by_class(targets).items():
            if len(members) == 1:
                raise ValueError(
                    f"{folder.root}: {names[target]} holds 1 image, and needs 2: one to train, one to test"
                )
            count = min(max(round(test_share * len(members)), 1), len(members) - 1)
            held_out.update(generator.sample(members, count))
    else:
        dealt = deal_groups(folder.groups, targets, (1 - test_share, test_share), generator)
        found = set(zip(dealt, targets, strict=True))
        for target in sorted({target for target in targets if not {(0, target), (1, target)} <= found}):
            own = sorted({group for group, other in zip(folder.groups, targets, strict=True) if other == target})
            raise ValueError(
                f"{folder.root}: {names[target]} is in {len(own)} group{'s' * (len(own) > 1)} ({shortened(own)}), "
                "of which none can be held out; add groups, or remove the class, or pass --test or a split of your own"
            )
        held_out.update(index for index, part in enumerate(dealt) if part)
    kept = [index for index in range(len(targets)) if index not in held_out]
    return folder.select(kept), folder.select(sorted(held_out))
