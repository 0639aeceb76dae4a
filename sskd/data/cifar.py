"""CIFAR-100 and CIFAR-10; the digests of the published files are checked before they are read.

The first load writes a cache beside the published files, which later loads read.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_and_extract_archive

from sskd.data.cache import read_cache, write_cache
from sskd.data.images import Split
from sskd.data.reading import Source, abbreviate, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError, one_line
from sskd.files import read_bounded

DOWNLOAD_TIMEOUT = 30.0  # seconds without any data
CIFAR_SIZE = 32
MAX_BYTES = 2**28  # of a file; the largest published one has 155 MB


def load_cifar100(settings: DatasetSettings) -> Source:
    """Load CIFAR-100: 50,000 training and 10,000 test images (Krizhevsky, 2009)."""
    return _load(CIFAR100, settings)


def load_cifar10(settings: DatasetSettings) -> Source:
    """Load CIFAR-10: 50,000 training and 10,000 test images (Krizhevsky, 2009)."""
    return _load(CIFAR10, settings)


def refuse_missing_cifar100(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _refuse_missing(CIFAR100, settings)


def refuse_missing_cifar10(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _refuse_missing(CIFAR10, settings)


def _load(dataset: type[CIFAR10], settings: DatasetSettings) -> Source:
    if settings.size != CIFAR_SIZE:
        raise UserError(
            f"dataset.size={settings.size}: CIFAR's images have {CIFAR_SIZE} pixels on each side; "
            f"set dataset.size={CIFAR_SIZE}"
        )
    root = absolute_path(settings.root)
    cache, published = _cache_path(dataset, root), _published_digests(dataset)
    source = read_cache(cache, published)
    if source is None:
        source = _read_published(dataset, root, settings.download)
        write_cache(cache, published, source)
    return source


def _read_published(dataset: type[CIFAR10], root: Path, download: bool) -> Source:
    files = _read_files(dataset, root)
    if download and (files.missing or files.differing):
        files = _download_once(dataset, root)
    if files.differing:
        raise UserError(
            f"{root / dataset.base_folder / files.differing[0]} differs from the published file "
            "(another MD5 digest); it may be truncated; move it away and run the command again "
            "with dataset.download=true, or set dataset.root=FOLDER to a complete copy"
        )
    if files.missing:
        raise _missing_error(dataset, root, files.missing)
    # The files are pickles. Only bytes with the published digest are unpickled.
    content = {
        name: pickle.loads(files.intact.pop(name), encoding="latin1") for name in [*files.intact]
    }
    classes = content[dataset.meta["filename"]][dataset.meta["key"]]
    train, test = (
        _to_split([content[name] for name, _ in batches])
        for batches in (dataset.train_list, dataset.test_list)
    )
    return Source(tuple(classes), train, test)


def _refuse_missing(dataset: type[CIFAR10], settings: DatasetSettings) -> None:
    root = absolute_path(settings.root)
    folder = root / dataset.base_folder
    missing = [name for name in _published_digests(dataset) if not (folder / name).exists()]
    if missing and not settings.download and not _cache_path(dataset, root).exists():
        raise _missing_error(dataset, root, missing)


def _missing_error(dataset: type[CIFAR10], root: Path, names: list[str]) -> UserError:
    return UserError(
        f"{dataset.__name__} is not in {root}: {root / dataset.base_folder} has no "
        f"{abbreviate(names)}; set dataset.root=FOLDER to a folder that holds "
        f"{dataset.base_folder}, or use dataset.download=true on a machine with internet access"
    )


def _to_split(batches: list[dict[str, Any]]) -> Split:
    images = np.concatenate([batch["data"] for batch in batches])
    key = "labels" if "labels" in batches[0] else "fine_labels"
    labels = [label for batch in batches for label in batch[key]]
    shape = (-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return Split(torch.from_numpy(images.reshape(shape)), torch.tensor(labels))


def _cache_path(dataset: type[CIFAR10], root: Path) -> Path:
    return root / f"{dataset.base_folder}.safetensors"


def _published_digests(dataset: type[CIFAR10]) -> dict[str, str]:
    """Return the MD5 digest of each published file by its name."""
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    return dict([*dataset.train_list, *dataset.test_list, meta])


class Files(NamedTuple):
    """The contents of the files with the published digest, and the names of the others."""

    intact: dict[str, bytes]
    missing: list[str]
    differing: list[str]


def _read_files(dataset: type[CIFAR10], root: Path) -> Files:
    files = Files({}, [], [])
    for name, md5 in _published_digests(dataset).items():
        path = root / dataset.base_folder / name
        try:
            content = read_bounded(path, MAX_BYTES, follow=True)
        except FileNotFoundError:
            files.missing.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        except ValueError:  # not a regular file, or too large
            files.differing.append(name)
        else:
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                files.intact[name] = content
            else:
                files.differing.append(name)
    return files


def _download_once(dataset: type[CIFAR10], root: Path) -> Files:
    """Download the missing files, one process at a time; existing files are not overwritten."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset.base_folder}.lock"), _socket_timeout(DOWNLOAD_TIMEOUT):
            # Another process may have downloaded the files while this one waited.
            files = _read_files(dataset, root)
            if files.missing and not files.differing:
                _download(dataset, root, files.missing)
                files = _read_files(dataset, root)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"{dataset.__name__} could not be downloaded from {dataset.url} to {root}: "
            f"{one_line(error)}; set dataset.root=FOLDER to a folder that holds "
            f"{dataset.base_folder}"
        ) from error
    return files


def _download(dataset: type[CIFAR10], root: Path, names: list[str]) -> None:
    """Download the files ``names`` into ``root``; a killed process leaves no partial file there."""
    part, folder = root / f".{dataset.base_folder}.part", root / dataset.base_folder
    download_and_extract_archive(
        dataset.url, root, part, filename=dataset.filename, md5=dataset.tgz_md5
    )
    folder.mkdir(exist_ok=True)
    for name in names:
        (part / dataset.base_folder / name).replace(folder / name)
    shutil.rmtree(part)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give new sockets a timeout of ``seconds``; torchvision sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
