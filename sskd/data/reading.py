"""What a source of images gives, and how its readers tell what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sskd.data.images import Split


class Source(NamedTuple):
    """A dataset as it is published, before any choice."""

    classes: tuple[str, ...]
    train: Split
    test: Split


def absolute(root: str) -> Path:
    return Path(root).expanduser().absolute()


def some(names: list[str], most: int = 5) -> str:
    """Join the first names, so that a message stays a line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
