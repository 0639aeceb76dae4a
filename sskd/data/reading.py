"""The dataset that a reader returns, and helpers for the error messages of readers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sskd.data.labelled import LabelledImages
from sskd.files import expanded


class Source(NamedTuple):
    """A dataset as it is published, before a part of it is selected.

    ``digest`` is the digest of the bytes that were read, if the reader computed it.
    """

    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    digest: str | None = None


def find_problem(source: Source) -> str | None:
    """Describe why ``source`` cannot be used for training; None if it can."""
    for name, split in (("training", source.train), ("test", source.test)):
        if len(split) == 0:
            return f"has no {name} images"
        low, high = (int(bound) for bound in split.labels.aminmax())
        if low < 0 or high >= len(source.classes):
            wrong = low if low < 0 else high
            return f"has a {name} image of class {wrong}, and {len(source.classes)} classes from 0"
    return None


def class_names(folders: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes for text files: bytes that are not UTF-8 are escaped."""
    return tuple(os.fsencode(name).decode(errors="backslashreplace") for name in folders)


def absolute_path(root: str) -> Path:
    return expanded(root).absolute()


def abbreviate(names: list[str], most: int = 5) -> str:
    """Join the first ``most`` names, and give the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
