import csv
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from project import rebuild_clipart as rebuild

CLASSES = {
    "bird",
    "bug",
    "building",
    "clothing",
    "dessert",
    "drink",
    "fruit_veg",
    "mammal",
    "plant",
    "vehicle",
}


def _find_clipart() -> Path:
    specification = importlib.util.find_spec("backbone_finetune")
    assert specification is not None
    assert specification.submodule_search_locations
    return Path(specification.submodule_search_locations[0], "recipes", "data", "clipart")


CLIPART = _find_clipart()


def _read_rows() -> list[dict[str, str]]:
    with (CLIPART / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _count_classes() -> Counter[str]:
    return Counter(path.parent.name for path in (CLIPART / "pictures").glob("*/*"))


def _read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.convert("RGB")


def _difference_hash(picture: Image.Image) -> int:
    """Return for each of 16x16 fields whether it is brighter than its right neighbour, as bits."""
    brightness = picture.convert("L").resize((17, 16), Image.Resampling.BOX).tobytes()
    bits = [
        brightness[17 * row + column] > brightness[17 * row + column + 1] for row in range(16) for column in range(16)
    ]
    return sum(bit << index for index, bit in enumerate(bits))


# The packaged clipart


def test_the_manifest_and_the_pictures_match_one_to_one() -> None:
    listed = [f"{row['class']}/{row['file']}" for row in _read_rows()]
    shipped = [path.relative_to(CLIPART / "pictures").as_posix() for path in (CLIPART / "pictures").rglob("*.*")]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(shipped)


def test_no_source_is_used_twice_or_lies_outside_the_package() -> None:
    sources = [row["source"] for row in _read_rows()]
    assert len(sources) == len(set(sources))
    assert not [source for source in sources if not re.fullmatch(r"(?!/)(?!.*\.\.).+\.png", source)]


def test_file_names_are_safe_on_every_file_system() -> None:
    names = [row["file"] for row in _read_rows()]
    assert [name for name in names if not re.fullmatch(r"[a-z_]+_[0-9]{3}\.jpg", name)] == []


def test_there_are_ten_classes_of_at_least_35_pictures() -> None:
    counts = _count_classes()
    assert set(counts) == CLASSES
    assert min(counts.values()) >= 35


def test_every_picture_is_a_small_rgb_jpeg() -> None:
    kinds = set()
    for path in (CLIPART / "pictures").glob("*/*"):
        with Image.open(path) as picture:
            picture.load()
            kinds.add((picture.format, picture.mode, picture.size))
    assert kinds == {("JPEG", "RGB", (64, 64))}


def test_all_pictures_together_stay_below_1_5_megabytes() -> None:
    assert sum(path.stat().st_size for path in (CLIPART / "pictures").glob("*/*")) < 1_500_000


def test_no_two_pictures_are_nearly_the_same() -> None:
    pictures = {path.name: _read(path) for path in sorted((CLIPART / "pictures").glob("*/*"))}
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)
    hashes = {name: _difference_hash(picture) for name, picture in pictures.items()}
    # The most similar two are 24 bits apart; recoloured and slightly edited drawings are 0 to 16 apart.
    near = [
        (name, other_name)
        for (name, bits), (other_name, other_bits) in itertools.combinations(hashes.items(), 2)
        if (bits ^ other_bits).bit_count() <= 16
    ]
    assert near == []


def test_the_readme_has_the_correct_counts() -> None:
    readme = (CLIPART / "README.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \**(\w+)\** \| \**(\d+)\** \|$", readme, flags=re.MULTILINE)
    counts = _count_classes()
    assert [(name, int(count)) for name, count in table] == [*sorted(counts.items()), ("all", counts.total())]
    assert f"# Clip art: {counts.total()} small pictures in ten classes" in readme


# rebuild_clipart.py, on a small source tree


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: tuple[str, str, str]) -> Path:
        path = tmp_path / "manifest.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("class", "file", "source"), *rows])
        return path

    return write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A package of one picture: a red bar, 80 wide and 40 high, on a large transparent canvas."""
    folder = tmp_path / "png"
    (folder / "animals").mkdir(parents=True)
    # Transparent pixels have a colour too, here black, which must not be visible.
    canvas = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    canvas.paste((255, 0, 0, 255), (150, 100, 230, 140))
    canvas.save(folder / "animals" / "bar.png")
    return folder


BAR = ("mammal", "mammal_001.jpg", "animals/bar.png")


def test_a_picture_is_put_on_white_cropped_made_square_and_shrunk(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    output = tmp_path / "deep" / "pictures"
    assert rebuild.rebuild(write_manifest(BAR), source, output) == 1
    with Image.open(output / "mammal" / "mammal_001.jpg") as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (64, 64))
    # Cropped to 80x40, padded to 80x80: a quarter white above, half red from edge to edge, a quarter white below.
    picture = _read(output / "mammal" / "mammal_001.jpg")
    expected = Image.new("RGB", (64, 64), "white")
    expected.paste("red", (0, 16, 64, 48))
    # JPEG halves the resolution of colour, hence the rows beside an edge are left out.
    for rows in ((0, 12), (20, 44), (52, 64)):
        box = (0, rows[0], 64, rows[1])
        assert max(ImageStat.Stat(ImageChops.difference(picture.crop(box), expected.crop(box))).mean) < 3, rows


def test_half_transparent_is_mixed_with_white(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    Image.new("RGBA", (50, 50), (0, 0, 0, 128)).save(source / "shadow.png")
    rebuild.rebuild(write_manifest(("plant", "plant_001.jpg", "shadow.png")), source, tmp_path / "pictures")
    assert ImageStat.Stat(_read(tmp_path / "pictures" / "plant" / "plant_001.jpg")).mean == pytest.approx(
        [127, 127, 127], abs=2
    )


def test_a_missing_source_raises(tmp_path: Path, source: Path, write_manifest: Callable[..., Path]) -> None:
    manifest = write_manifest(BAR, ("mammal", "mammal_002.jpg", "animals/gone.png"))
    with pytest.raises(FileNotFoundError, match=r"animals/gone\.png: not there; install openclipart-png"):
        rebuild.rebuild(manifest, source, tmp_path / "pictures")


@pytest.mark.parametrize("size", [(6000, 5001), (10_000, 9_000), (20_000, 10_000)])
def test_an_oversized_source_raises(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path], size: tuple[int, int]
) -> None:
    # Below Pillow's own limits, above the one where it warns, and above the one where it raises.
    Image.new("1", size).save(source / "huge.png")
    with pytest.raises(ValueError, match=r"huge\.png: .* pixels.*; repair it, or remove it from .*manifest\.csv"):
        rebuild.rebuild(write_manifest(("mammal", "mammal_001.jpg", "huge.png")), source, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_a_source_of_exactly_the_limit_is_read(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    Image.new("1", (6000, 5000)).save(source / "large.png")
    manifest = write_manifest(("mammal", "mammal_001.jpg", "large.png"))
    assert rebuild.rebuild(manifest, source, tmp_path / "pictures") == 1


@pytest.mark.parametrize("damage", ["blank", "empty", "truncated", "broken", "text"])
def test_an_empty_or_damaged_source_raises(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path], damage: str
) -> None:
    path = source / "damaged.png"
    if damage == "blank":
        Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    else:
        whole = (source / "animals" / "bar.png").read_bytes()
        length_at = whole.index(b"IDAT") - 4
        contents = {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            # The pixel data is too short, so no chunk begins where the next one should.
            "broken": whole[:length_at] + (30).to_bytes(4, "big") + whole[length_at + 4 :],
            "text": b"no picture",
        }
        path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=r"damaged\.png: .*; repair it, or remove it from"):
        rebuild.rebuild(write_manifest(("bug", "bug_001.jpg", "damaged.png")), source, tmp_path / "pictures")


def test_an_existing_output_is_replaced_as_a_whole(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    output = tmp_path / "pictures"
    (output / "mammal").mkdir(parents=True)
    (output / "mammal" / "mammal_009.jpg").write_text("of an earlier run")
    rebuild.rebuild(write_manifest(BAR), source, output)
    assert [path.name for path in output.rglob("*.*")] == ["mammal_001.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.csv", "pictures", "png"]


def test_an_existing_output_is_kept_if_a_source_fails(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    output = tmp_path / "pictures"
    (output / "mammal").mkdir(parents=True)
    (output / "mammal" / "mammal_001.jpg").write_text("of an earlier run")
    with pytest.raises(FileNotFoundError):
        rebuild.rebuild(write_manifest(BAR, ("mammal", "mammal_002.jpg", "animals/gone.png")), source, output)
    assert (output / "mammal" / "mammal_001.jpg").read_text() == "of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.csv", "pictures", "png"]


@pytest.mark.parametrize("foreign", ["notes.txt", "holiday/beach.jpg", "mammal/notes.txt", "mammal/old/cat.jpg"])
def test_an_output_with_other_files_is_not_changed(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path], foreign: str
) -> None:
    path = tmp_path / "pictures" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match="is replaced as a whole, but holds"):
        rebuild.rebuild(write_manifest(BAR), source, tmp_path / "pictures")
    assert path.read_text() == "mine"


def test_the_script_reads_the_manifest_of_the_package(
    tmp_path: Path, source: Path, write_manifest: Callable[..., Path]
) -> None:
    clipart = tmp_path / rebuild.CLIPART.relative_to(Path(rebuild.__file__).parents[2])
    clipart.mkdir(parents=True)
    write_manifest(BAR).rename(clipart / "manifest.csv")
    script = tmp_path / "benchmarks" / "project" / "rebuild_clipart.py"
    script.parent.mkdir(parents=True)
    shutil.copy(rebuild.__file__, script)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=source)

    finished = run("--source", str(source))
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == f"wrote 1 pictures to {clipart / 'pictures'}\n"
    assert (clipart / "pictures" / "mammal" / "mammal_001.jpg").is_file()

    assert run("--source", str(source), "--output", str(tmp_path / "other")).returncode == 0
    assert (tmp_path / "other" / "mammal" / "mammal_001.jpg").is_file()

    failed = run("--source", str(tmp_path / "nowhere"))
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"rebuild_clipart.py: {tmp_path / 'nowhere' / 'animals' / 'bar.png'}: not there")
    assert "Traceback" not in failed.stderr


@pytest.mark.skipif(not rebuild.SOURCE.is_dir(), reason="the Debian package openclipart-png is not installed")
def test_the_debian_package_gives_the_packaged_pictures(tmp_path: Path) -> None:
    rebuild.rebuild(rebuild.MANIFEST, rebuild.SOURCE, tmp_path / "pictures")
    # Another Pillow or libjpeg may round differently, so compare with a small tolerance.
    different = [
        row["file"]
        for row in _read_rows()
        if max(
            ImageStat.Stat(
                ImageChops.difference(
                    _read(tmp_path / "pictures" / row["class"] / row["file"]),
                    _read(CLIPART / "pictures" / row["class"] / row["file"]),
                )
            ).mean
        )
        > 2
    ]
    assert different == []
