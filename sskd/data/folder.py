"""A folder of images by class: its images as tensors, and its digest."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from sskd.data.decode import MAX_BYTES, quiet_pillow, read_image, unreadable_error
from sskd.data.digests import digest_line, file_digests
from sskd.data.images import Split
from sskd.data.listing import PARTS, Listing, is_hidden, is_image, list_folder, walk
from sskd.data.packed.source import load_packed, packed_digest
from sskd.data.packed.writing import Listings
from sskd.data.reading import Source, absolute_path, class_names
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError
from sskd.output import complain_once


def load_folder(settings: DatasetSettings) -> Source:
    """Load ``root/train/CLASS`` and ``root/test/CLASS``, with the same classes in both.

    They are in memory, or in a packed file if their crops are resized.
    """
    root = absolute_path(settings.root)
    train, test, skipped = list_folder(root)
    if summary := str(skipped):
        complain_once(f"{root}: skipped {summary}")
    return _STORAGE[settings.crop].load(settings, (train, test))


def _load_into_memory(settings: DatasetSettings, listings: Listings) -> Source:
    _refuse_large(settings, listings)
    return read_listings(absolute_path(settings.root), listings, settings.size)


def _refuse_large(settings: DatasetSettings, listings: Listings) -> None:
    """Raise UserError if the images do not fit into the memory that they may use."""
    root = absolute_path(settings.root)
    count = sum(len(listing.paths) for listing in listings)
    gib = count * 3 * settings.size**2 / 2**30
    if gib > settings.in_memory_gib:
        raise UserError(
            f"{root}: its {count:,} images need {gib:.1f} GiB of memory, more than "
            f"dataset.in_memory_gib={settings.in_memory_gib:g}; set dataset.crop=resized to pack "
            f"them into a file, or dataset.in_memory_gib={math.ceil(gib)}"
        )


def folder_digest(settings: DatasetSettings) -> str:
    """Return the SHA-256 of the paths and contents of the images that ``load_folder`` reads."""
    root = absolute_path(settings.root)
    train, test, _ = list_folder(root)
    return _STORAGE[settings.crop].digest(settings, (train, test))


def _digest_of_files(settings: DatasetSettings, listings: Listings) -> str:
    _refuse_large(settings, listings)  # before all of them are read
    return digest_of(absolute_path(settings.root), listings)


def read_listings(root: Path, listings: Listings, size: int) -> Source:
    """Read the listed images of both parts, training and test, scaled to ``size``."""
    content = hashlib.sha256()
    train, test = (_read_part(root, listing, size, content.update) for listing in listings)
    return Source(class_names(listings[0].classes), train, test, content.hexdigest())


def digest_of(root: Path, listings: Listings) -> str:
    """Return the SHA-256 of the paths and contents of the listed images."""
    paths = [path for listing in listings for path in listing.paths]
    digests = file_digests(root, paths, MAX_BYTES, unreadable_error)
    content = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        content.update(digest_line(path, digest))
    return content.hexdigest()


def refuse_missing_folder(settings: DatasetSettings) -> None:
    """Raise UserError if ``load_folder`` would refuse the folder; no image is read."""
    train, test, _ = list_folder(absolute_path(settings.root))
    _STORAGE[settings.crop].refuse(settings, (train, test))


def names_and_sizes(settings: DatasetSettings) -> str | None:
    """Return the digest that earlier versions computed for the folder.

    It covers the names and sizes of all files, including hidden ones. The result is None if those
    versions read an image that is skipped now: their runs then used other images.
    """
    root = absolute_path(settings.root)
    try:
        folders = [step for part in PARTS for step in walk(root / part)]
    except (OSError, UserError):  # those versions also walked hidden folders, and would have failed
        return None
    paths = [Path(folder, name) for folder, _, files in folders for name in files]
    inner_parts = [path.relative_to(root).parts[1:] for path in paths]
    if any(is_image(each[-1]) and any(map(is_hidden, each)) and each[1:] for each in inner_parts):
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(os.fsencode(f"{path.relative_to(root)} {path.stat().st_size}\n"))
    return digest.hexdigest()


def _read_part(root: Path, listing: Listing, size: int, update: Callable[[bytes], object]) -> Split:
    """Read the images of one part, and call ``update`` with the digest line of each of them."""
    images = torch.empty(len(listing.paths), 3, size, size, dtype=torch.uint8)
    # Threads suffice: Pillow releases the interpreter lock while it decodes and scales.
    with quiet_pillow(), ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda path: read_image(root / path, size), listing.paths)
        top = root / listing.paths[0].split("/")[0]
        progress = tqdm(decoded, str(top), len(images), unit="image", disable=None)
        for position, (image, digest) in enumerate(progress):
            images[position] = image
            update(digest_line(listing.paths[position], digest))
    return Split(images, torch.tensor(listing.labels))


def _refuse_none(settings: DatasetSettings, listings: Listings) -> None:
    """Accept any number of images."""


class _Storage(NamedTuple):
    """How the listed images of a folder are read and refused, in memory or in a packed file."""

    load: Callable[[DatasetSettings, Listings], Source]
    digest: Callable[[DatasetSettings, Listings], str]
    refuse: Callable[[DatasetSettings, Listings], None]


_STORAGE = {
    "padded": _Storage(_load_into_memory, _digest_of_files, _refuse_large),
    "resized": _Storage(load_packed, packed_digest, _refuse_none),
}
