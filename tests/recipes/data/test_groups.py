"""Groups of images, such as those of a patient, are never on two sides of a split that is drawn here."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_folders import COLOURS, make_image
from timm.data.transforms_factory import create_transform
from torch.utils.data import Subset
from torchvision.transforms.functional import pil_to_tensor

from backbone_finetune.recipes import (
    ImageDataset,
    LabelledFolder,
    data_fingerprint,
    find_splits,
)
from backbone_finetune.recipes.data.groups import deal_groups, split
from backbone_finetune.recipes.data.sources.parts import find_data
from backbone_finetune.recipes.training.folds import check_folds, split_folds


def make_labelled(targets: list[int], groups: list[str] | None) -> LabelledFolder:
    paths = tuple(Path(f"{index}.png") for index in range(len(targets)))
    names = tuple(f"class {target}" for target in range(max(targets) + 1))
    return LabelledFolder(Path("table.csv"), names, paths, tuple(targets), None if groups is None else tuple(groups))


def sides(*parts: LabelledFolder) -> list[set[str]]:
    return [set(part.groups or ()) for part in parts]


@given(
    counts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=30),
    shares=st.sampled_from([(0.7, 0.3), (0.8, 0.2), (0.25,) * 4]),
    seed=st.integers(0, 2**32),
)
def test_a_group_is_in_one_part_and_the_shares_of_classes_are_near(
    counts: list[tuple[int, int]], shares: tuple[float, ...], seed: int
) -> None:
    groups = [f"{index}" for index, (_, size) in enumerate(counts) for _ in range(size)]
    targets = [target for target, size in counts for _ in range(size)]
    parts = deal_groups(groups, targets, shares, random.Random(seed))
    assert len(set(zip(groups, parts, strict=True))) == len(counts)
    assert deal_groups(groups, targets, shares, random.Random(seed)) == parts
    for target in set(targets):
        total, largest = targets.count(target), max(size for other, size in counts if other == target)
        own = Counter(part for part, other in zip(parts, targets, strict=True) if other == target)
        for part, share in enumerate(shares):
            # A class is where it has groups enough for all parts; beyond that a part is at most one group off.
            assert own[part] or sum(other == target for other, _ in counts) < len(shares)
            assert abs(own[part] - share * total) <= largest + share


def test_a_split_by_groups(caplog: pytest.LogCaptureFixture) -> None:
    groups = [f"patient {index // 4}" for index in range(80)]
    folder = make_labelled([index // 2 % 2 for index in range(80)], groups)
    train, test = split(folder, test_share=0.3, seed=0)
    ours, theirs = sides(train, test)
    assert not ours & theirs
    assert len(ours | theirs) == 20
    assert Counter(test.targets) == {0: 12, 1: 12}
    assert [groups[folder.paths.index(path)] for path in test.paths] == list(test.groups or ())
    assert len({split(folder, test_share=0.3, seed=seed)[1].paths for seed in range(5)}) == 5


def test_without_groups_splits_are_those_of_earlier_versions() -> None:
    folder = make_labelled([index % 2 for index in range(20)], None)
    held_out = [int(path.stem) for path in split(folder, test_share=0.3, seed=0)[1].paths]
    assert held_out == [0, 9, 12, 15, 17, 18]
    data = ImageDataset(make_labelled([0] * 6 + [1] * 4, None), pil_to_tensor)
    assert split_folds(data, 3, seed=0) == [[1, 5, 6, 9], [2, 3, 8], [0, 4, 7]]


def test_a_class_of_one_group_raises() -> None:
    folder = make_labelled([0, 0, 0, 0, 1, 1], ["ann", "ann", "bob", "bob", "bob", "bob"])
    with pytest.raises(ValueError, match=r"table\.csv: class class 1 is in 1 group \(bob\), of which none can be held"):
        split(folder, test_share=0.3, seed=0)


def test_folds_by_groups() -> None:
    data = ImageDataset(
        make_labelled([index % 2 for index in range(24)], [f"{index // 3}" for index in range(24)]), len
    )
    folds = split_folds(data, 4, seed=0)
    assert sorted(index for fold in folds for index in fold) == list(range(24))
    assert [len(fold) for fold in folds] == [6] * 4
    assert sum(len({index // 3 for index in fold}) for fold in folds) == 8
    half = Subset(data, range(12, 24))
    assert {frozenset((12 + index) // 3 for index in fold) for fold in split_folds(half, 4, seed=0)} == {
        frozenset({group}) for group in range(4, 8)
    }
    with pytest.raises(ValueError, match=r"folds = 5: expected at most 4, the groups of the training images"):
        check_folds(half, 5)


def write_table(root: Path, name: str, lines: list[str]) -> Path:
    (root / name).write_text("\n".join(lines) + "\n")
    return root / name


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of 24 images: four of each of six patients, two of each class."""
    lines = ["path,label,patient"]
    for index in range(24):
        name = ("blue", "red")[index % 2]
        make_image(tmp_path / f"{index}.png", COLOURS[name], seed=index, size=(8, 8))
        lines.append(f"{index}.png,{name},patient {index // 4}")
    return write_table(tmp_path, "images.csv", lines)


def test_a_column_of_groups(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_splits(table)["train"].groups is None
    caplog.set_level("INFO")
    parts = list(find_data(table, chooses=True, test_share=0.3, seed=0, group="patient").values())
    assert [len(part.paths) for part in parts] == [12, 4, 8]
    assert not set.intersection(*sides(*parts[:2])) | set.intersection(*sides(*parts[1:]))
    assert f"test: 8 images from {table}, 30 % of each class, by groups, held out" in caplog.messages
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    renamed = table.with_name("renamed.csv")
    renamed.write_text(table.read_text().replace("patient\n", " Group\n"))
    assert find_data(renamed, chooses=True, test_share=0.3, seed=0)["train"].groups == parts[0].groups


def test_the_fingerprint_of_a_dataset_has_its_groups(table: Path) -> None:
    prints = set()
    for group in (None, "patient", "label"):
        prints.add(data_fingerprint(ImageDataset(find_splits(table, group=group)["train"], create_transform(32))))
    assert len(prints) == 3


def test_wrong_groups_raise(table: Path) -> None:
    def find(path: Path, group: str | None) -> None:
        find_data(path, test_share=0.3, seed=0, group=group)

    with pytest.raises(ValueError, match=r"no column person; its columns are path, label, patient"):
        find(table, "person")
    twice = write_table(table.parent, "twice.csv", ["path,label,patient,patient", "0.png,blue,a,b"])
    with pytest.raises(
        ValueError, match=r"twice\.csv: 2 columns patient; its columns are path, label, patient, patient"
    ):
        find(twice, "patient")
    with pytest.raises(ValueError, match=r"no table; groups are read from columns of a table"):
        find(table.parent, "patient")
    table.write_text(table.read_text() + "0.png,red,\n")
    with pytest.raises(ValueError, match=r"images\.csv, line 26: no patient; fill it in, or remove the row"):
        find(table, "patient")


def test_groups_that_given_splits_share_are_named(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = table.read_text().splitlines()
    test = write_table(table.parent, "test.csv", [lines[0], *lines[-8:]])
    find_data(table, test=test, test_share=0.3, seed=0, group="patient", chooses=False)
    assert caplog.messages[-1] == (
        "2 groups have images in both train and test, which may make the test accuracy too high: patient 4, patient 5"
    )
