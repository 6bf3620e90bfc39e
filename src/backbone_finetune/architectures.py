"""The names that timm knows its architectures and weights by."""

from __future__ import annotations

import difflib

import timm


def check_architecture(name: str) -> None:
    """Raise ValueError unless timm knows an architecture and, where the name has one, its weights tag.

    >>> check_architecture("resnet18.a1_in1k")
    >>> check_architecture("resnet81")
    Traceback (most recent call last):
    ...
    ValueError: resnet81: timm ... has no such architecture; the nearest names are ...resnet18...

    The message lists the nearest names, or the tags that there are.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        hint = f"the nearest names are {', '.join(nearest)}" if nearest else "timm.list_models() lists all names"
        raise ValueError(f"{name}: timm {timm.__version__} has no such architecture; {hint}.")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = f"its tags are {', '.join(tags)}" if tags else "it has no pretrained weights"
        raise ValueError(f"{name}: {architecture} has no weights tagged {tag!r}; {known}.")
