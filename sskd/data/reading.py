"""What a source of images gives, and how its readers tell what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sskd.data.images import Split
from sskd.files import expanded


class Source(NamedTuple):
    """A dataset as it is published, before any choice.

    ``digest`` is the source's fingerprint of what was read, if the reader took it on the way.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split
    digest: str | None = None


def find_problem(source: Source) -> str | None:
    """Return what makes ``source`` unfit for training, in words; None where nothing does."""
    for name, split in (("training", source.train), ("test", source.test)):
        if len(split) == 0:
            return f"has no {name} images"
        low, high = (int(found) for found in split.labels.aminmax())
        if low < 0 or high >= len(source.classes):
            wrong = low if low < 0 else high
            return f"has a {name} image of class {wrong}, and {len(source.classes)} classes from 0"
    return None


def absolute_path(root: str) -> Path:
    return expanded(root).absolute()


def abbreviate(names: list[str], most: int = 5) -> str:
    """Join the first names, so that a message stays a line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
