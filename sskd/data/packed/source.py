"""Packed datasets: the place of the file, and the splits that are read from it."""

from __future__ import annotations

from pathlib import Path

import torch

from sskd.data.packed.file import PackedFile
from sskd.data.packed.split import PackedSplit
from sskd.data.packed.workers import default_workers
from sskd.data.packed.writing import Listings, open_or_pack
from sskd.data.reading import Source, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.files import safe_join

FOLDER = ".sskd-packed"  # hidden, so that it is not read as a class


def load_packed(settings: DatasetSettings, listings: Listings) -> Source:
    """Load the listed images, training and test, from their packed file; it is made if missing."""
    file = _open(settings, listings)
    count = len(file.index.labels)
    workers = default_workers() if settings.workers is None else settings.workers
    everything = PackedSplit(
        file, torch.arange(count), file.index.labels, size=settings.size, workers=workers
    )
    train = everything.take(torch.arange(file.index.train))
    test = everything.take(torch.arange(file.index.train, count))
    return Source(file.index.classes, train, test, file.index.digest)


def packed_digest(settings: DatasetSettings, listings: Listings) -> str:
    """Return the SHA-256 of the paths and contents of the listed images, which are packed first."""
    return _open(settings, listings).index.digest


def path_of(settings: DatasetSettings) -> Path:
    """Return the path of the packed file.

    Raises:
        UserError: its folder is a symbolic link, which came with the images.
    """
    root = absolute_path(settings.root)
    chosen = settings.packed
    folder = absolute_path(chosen) if chosen else safe_join(root, FOLDER, setting="dataset.packed")
    return folder / f"{settings.name}.pack"


def _open(settings: DatasetSettings, listings: Listings) -> PackedFile:
    return open_or_pack(path_of(settings), absolute_path(settings.root), listings)
