"""What a model file says about its model, as text and back; nothing of a file is believed before it is checked."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import timm

from backbone_finetune.validation import check_architecture

from ..text import has_control_characters

__all__ = ["ModelDescription", "parse_metadata", "write_metadata"]

LARGEST_SIDE = 4096
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class ModelDescription:
    """All that it takes to build a model again and to feed it a picture, but for its tensors.

    ``arguments`` are those of `FineTuneModel.from_timm` beside the name and the classes, ``trainable`` the names of the
    parameters that are not frozen, ``versions`` those of the libraries that wrote the file, ``record`` what its
    training left behind (its metrics, for one).

    >>> ModelDescription("test_resnet", ("cat", "dog"), {"input_size": (3, 96, 96)}).trainable
    ()
    """

    architecture: str
    class_names: tuple[str, ...]
    data_config: Mapping[str, Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    norm_eval: bool = False
    trainable: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    record: Any = None


def write_metadata(description: ModelDescription) -> dict[str, str]:
    """Write a description as the metadata of a ``.safetensors`` file: text by name.

    >>> config = timm.data.resolve_model_data_config(timm.create_model("test_resnet"))
    >>> metadata = write_metadata(ModelDescription("test_resnet", ("cat", "dog"), config, {"global_pool": "max"}))
    >>> metadata["architecture"], metadata["class_names"], parse_metadata(metadata).arguments
    ('test_resnet', '["cat", "dog"]', {'global_pool': 'max'})

    Raises:
        ValueError: `parse_metadata` would refuse it.
    """
    metadata = {
        "architecture": description.architecture,
        "arguments": json.dumps(dict(description.arguments)),
        "class_names": json.dumps(description.class_names),
        "data_config": json.dumps(dict(description.data_config)),
        "freeze_state": json.dumps({"norm_eval": description.norm_eval, "trainable": description.trainable}),
        "versions": json.dumps(dict(description.versions)),
        "record": json.dumps(description.record),
    }
    parse_metadata(metadata)
    return metadata


def parse_metadata(metadata: Mapping[str, str]) -> ModelDescription:
    """Read a description from the metadata of a file; see `write_metadata` for an example.

    Raises:
        ValueError: an entry is missing, of another kind or out of range, or the architecture is not one of timm's own
            names: what another name points to, timm would fetch.
    """
    missing = [name for name in ("architecture", "class_names", "data_config") if name not in metadata]
    if missing:
        raise ValueError(f"{missing[0]} is missing from its metadata")
    architecture = metadata["architecture"]
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture[:80]!r}, which the file names")
    check_architecture(architecture)
    freeze_state = parse_object(metadata, "freeze_state", {"norm_eval": False, "trainable": []})
    versions = parse_object(metadata, "versions", {})
    if any(has_control_characters(f"{name}{version}") for name, version in versions.items()):
        raise ValueError(f"versions: {shortened(versions)}; expected no control characters")
    if set(freeze_state) != {"norm_eval", "trainable"}:
        raise ValueError(f"freeze_state: {shortened(freeze_state)}; expected norm_eval and trainable")
    return ModelDescription(
        architecture,
        parse_class_names(metadata["class_names"]),
        parse_data_config(metadata["data_config"]),
        check_arguments(parse_object(metadata, "arguments", {})),
        checked(freeze_state["norm_eval"], lambda value: isinstance(value, bool), "norm_eval", "true or false"),
        tuple(checked(freeze_state["trainable"], is_list_of_names, "trainable", "a list of parameter names")),
        {name: str(version)[:80] for name, version in versions.items()},
        parse_json("record", metadata.get("record", "null")),
    )


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check that the arguments of a network are among those that a file may give: none that reads, fetches or repeats.

    >>> check_arguments({"drop_rate": 0.2, "global_pool": "max", "img_size": 96})
    {'drop_rate': 0.2, 'global_pool': 'max', 'img_size': 96}

    Raises:
        ValueError: an argument is not, or its value is out of range.
    """
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise ValueError(f"arguments: {name[:80]!r}; a file may give {', '.join(ARGUMENTS)}")
        is_allowed, expected = ARGUMENTS[name]
        checked(value, is_allowed, name, expected)
    return dict(arguments)


def parse_class_names(text: str) -> tuple[str, ...]:
    """Read the class names of a file's metadata.

    >>> parse_class_names('["cat", "dog"]')
    ('cat', 'dog')

    Raises:
        ValueError: they are not a list of two different names or more, without control characters, each of which a
            folder can have.
    """
    names = parse_json("class_names", text)
    if not (is_list_of_names(names) and len(names) > 1):
        raise ValueError(f"class_names: {text[:80]}; expected a list of two names or more")
    if unfit := [name for name in names if has_control_characters(name)]:
        raise ValueError(f"class_names: {unfit[0][:80]!r} has control characters, which a terminal would act on")
    if strange := [name for name in names if not is_file_name(name)]:
        raise ValueError(
            f"class_names: {strange[0][:80]!r} is no text, nor bytes as Python knows those of a file's name"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"class_names: {text[:80]}; two classes have one name")
    return tuple(names)


def is_file_name(text: str) -> bool:
    r"""Say whether a text can be a file's name: bytes that are no text are in it as U+DC80 to U+DCFF, by `os.fsdecode`.

    >>> is_file_name("chat noir"), is_file_name("c\udcff"), is_file_name("c\ud800")
    (True, True, False)
    """
    try:
        text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def parse_data_config(text: str) -> dict[str, Any]:
    """Read timm's data config of a file's metadata.

    >>> parse_data_config(
    ...     '{"input_size": [3, 96, 96], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], '
    ...     '"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}'
    ... )["input_size"]
    (3, 96, 96)

    Raises:
        ValueError: it is not JSON, or an entry is missing, not known or out of range.
    """
    entries = parse_json("data_config", text)
    if not isinstance(entries, dict) or set(entries) != set(DATA_CONFIG):
        raise ValueError(f"data_config: {text[:80]}; expected {', '.join(DATA_CONFIG)}")
    for name, (is_allowed, expected) in DATA_CONFIG.items():
        checked(entries[name], is_allowed, name, expected)
    if max(entries["input_size"]) / entries["crop_pct"] > LARGEST_SIDE:
        raise ValueError(
            f"crop_pct: {entries['crop_pct']} of an input_size of {entries['input_size']} makes pictures of "
            f"{max(entries['input_size']) / entries['crop_pct']:,.0f} pixels; expected {LARGEST_SIDE:,} at most"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}


def parse_object(metadata: Mapping[str, str], name: str, default: dict[str, Any]) -> dict[str, Any]:
    """Read an entry that is a JSON object, and may be missing.

    >>> parse_object({}, "versions", {})
    {}
    """
    value = parse_json(name, metadata[name]) if name in metadata else default
    return checked(value, lambda found: isinstance(found, dict), name, "an object")


def parse_json(name: str, text: str) -> Any:
    """Read an entry that is JSON.

    >>> parse_json("record", "{")
    Traceback (most recent call last):
    ...
    ValueError: record: {; expected JSON
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it is nested a thousand times
        raise ValueError(f"{name}: {text[:80]}; expected JSON") from error


def checked(value: ValueT, is_allowed: Callable[[Any], bool], name: str, expected: str) -> ValueT:
    """Give a value back if it is allowed.

    >>> checked(1.5, is_rate, "drop_rate", "a number from 0 to below 1")
    Traceback (most recent call last):
    ...
    ValueError: drop_rate: 1.5; expected a number from 0 to below 1
    """
    if not is_allowed(value):
        raise ValueError(f"{name}: {shortened(value)}; expected {expected}")
    return value


def shortened(value: object) -> str:
    """Show a value in 80 characters at most.

    >>> shortened([1, 2])
    '[1, 2]'
    """
    return repr(value)[:80]


def is_number(value: object) -> bool:
    """Say whether a value is a number of a size that means something: no infinity, nor True or False.

    >>> is_number(1), is_number(True), is_number(float("nan"))
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def is_rate(value: object) -> bool:
    """Say whether a value is a share, from 0 to below 1.

    >>> is_rate(0), is_rate(1)
    (True, False)
    """
    return isinstance(value, int | float) and is_number(value) and 0 <= value < 1


def is_side(value: object) -> bool:
    """Say whether a value is a number of pixels that a picture may be wide or high.

    >>> is_side(224), is_side(10**9)
    (True, False)
    """
    return isinstance(value, int) and is_number(value) and 1 <= value <= LARGEST_SIDE


def is_list_of_names(value: object) -> bool:
    """Say whether a value is a list of texts.

    >>> is_list_of_names(["cat"]), is_list_of_names("cat")
    (True, False)
    """
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_triple(value: object, is_allowed: Callable[[Any], bool]) -> bool:
    """Say whether a value is a list of three allowed ones: a value per colour.

    >>> is_triple([0.5, 0.5, 0.5], is_number)
    True
    """
    return isinstance(value, list) and len(value) == 3 and all(map(is_allowed, value))


SIDES = f"1 to {LARGEST_SIDE}"
RATE = (is_rate, "a number from 0 to below 1")
ARGUMENTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "drop_rate": RATE,
    "drop_path_rate": RATE,
    "attn_drop_rate": RATE,
    "proj_drop_rate": RATE,
    "patch_drop_rate": RATE,
    "global_pool": (lambda value: isinstance(value, str) and len(value) <= 20, "the name of a pooling"),
    "img_size": (
        lambda value: (
            is_side(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(is_side, value)))
        ),
        f"a side of {SIDES} pixels, or two",
    ),
    "dynamic_img_size": (lambda value: isinstance(value, bool), "true or false"),
}
DATA_CONFIG: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (
        lambda value: is_triple(value, is_side) and value[0] == 3,
        f"3 colours, then height and width, {SIDES}",
    ),
    "mean": (lambda value: is_triple(value, is_number), "a number for each of 3 colours"),
    "std": (
        lambda value: is_triple(value, lambda part: is_number(part) and part >= 1e-6),
        "a number above 0 for each of 3 colours",
    ),
    "interpolation": (
        lambda value: value in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
        "bilinear, bicubic or another filter of Pillow",
    ),
    "crop_pct": (lambda value: is_number(value) and 0.1 <= value <= 10, "a number from 0.1 to 10"),
    "crop_mode": (lambda value: value in ("center", "squash", "border"), "center, squash or border"),
}
