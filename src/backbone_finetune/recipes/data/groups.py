"""Images that belong together: those of a class, and groups, such as those of one patient, which no split divides."""

import random
from collections import Counter
from collections.abc import Hashable, Sequence


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


def lacking_classes(dealt: Sequence[int], targets: Sequence[int], parts: int) -> list[int]:
    """Return the classes that are not in each part, in order.

    >>> lacking_classes([0, 0, 1], [0, 1, 1], parts=2)
    [0]
    """
    found = set(zip(dealt, targets, strict=True))
    return sorted({target for target in targets if any((part, target) not in found for part in range(parts))})
