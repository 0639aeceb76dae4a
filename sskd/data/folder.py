"""A folder of images by class: its images as tensors, and its digest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from sskd.data.decode import MAX_BYTES, quiet_pillow, read_image, unreadable_error
from sskd.data.digests import file_digests
from sskd.data.images import Split
from sskd.data.listing import PARTS, Listing, is_hidden, is_image, list_folder, walk
from sskd.data.reading import Source, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError
from sskd.output import complain_once


def load_folder(settings: DatasetSettings) -> Source:
    """Load ``root/train/CLASS`` and ``root/test/CLASS``, with the same classes in both."""
    root = absolute_path(settings.root)
    train, test, skipped = list_folder(root)
    if summary := str(skipped):
        complain_once(f"{root}: skipped {summary}")
    return read_listings(root, (train, test), settings.size)


def folder_digest(settings: DatasetSettings) -> str:
    """Return the SHA-256 of the paths and contents of the images that ``load_folder`` reads."""
    root = absolute_path(settings.root)
    train, test, _ = list_folder(root)
    return digest_of(root, (train, test))


def read_listings(root: Path, listings: tuple[Listing, Listing], size: int) -> Source:
    """Read the listed images of both parts, training and test, scaled to ``size``."""
    content = hashlib.sha256()
    train, test = (_read_part(root, listing, size, content.update) for listing in listings)
    # The names are written to text files, so bytes that are not UTF-8 are escaped.
    classes = (os.fsencode(name).decode(errors="backslashreplace") for name in listings[0].classes)
    return Source(tuple(classes), train, test, content.hexdigest())


def digest_of(root: Path, listings: tuple[Listing, Listing]) -> str:
    """Return the SHA-256 of the paths and contents of the listed images."""
    paths = [path for listing in listings for path in listing.paths]
    digests = file_digests(root, paths, MAX_BYTES, unreadable_error)
    content = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        content.update(_digest_line(path, digest))
    return content.hexdigest()


def refuse_missing_folder(settings: DatasetSettings) -> None:
    """Raise UserError if ``load_folder`` would find no images, or other classes in each part."""
    list_folder(absolute_path(settings.root))


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


def _digest_line(path: str, digest: str) -> bytes:
    return os.fsencode(path) + b"\0" + digest.encode() + b"\n"


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
            update(_digest_line(listing.paths[position], digest))
    return Split(images, torch.tensor(listing.labels))
