"""CIFAR-100 and CIFAR-10, read after their digests were checked.

The first load leaves a cache beside the published files, from which later ones read.
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
from sskd.data.reading import Source, abbreviate, absolute_path, one_line
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError
from sskd.files import read_bounded

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
CIFAR_SIZE = 32
MOST_BYTES = 2**28  # of a file; the largest published one has 155 MB


def cifar100(settings: DatasetSettings) -> Source:
    """CIFAR-100 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR100, settings)


def cifar10(settings: DatasetSettings) -> Source:
    """CIFAR-10 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR10, settings)


def refuse_missing_cifar100(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load, and none may be downloaded."""
    _refuse_missing(CIFAR100, settings)


def refuse_missing_cifar10(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load, and none may be downloaded."""
    _refuse_missing(CIFAR10, settings)


def _cifar(dataset: type[CIFAR10], settings: DatasetSettings) -> Source:
    if settings.size != CIFAR_SIZE:
        raise UserError(
            f"dataset.size={settings.size}: CIFAR's images have {CIFAR_SIZE} pixels a side; "
            f"set dataset.size={CIFAR_SIZE}"
        )
    root = absolute_path(settings.root)
    cache, published = _cache_of(dataset, root), _published(dataset)
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
            "(another MD5 digest), it may be cut short; move it away and load again with "
            "dataset.download=true, or set dataset.root=FOLDER to a whole copy's"
        )
    if files.missing:
        raise _missing(dataset, root, files.missing)
    # The files are pickles. What is unpickled are the very bytes whose digest is the published one.
    content = {
        name: pickle.loads(files.whole.pop(name), encoding="latin1") for name in [*files.whole]
    }
    classes = content[dataset.meta["filename"]][dataset.meta["key"]]
    train, test = (
        _cifar_split([content[name] for name, _ in published])
        for published in (dataset.train_list, dataset.test_list)
    )
    return Source(tuple(classes), train, test)


def _refuse_missing(dataset: type[CIFAR10], settings: DatasetSettings) -> None:
    root = absolute_path(settings.root)
    home = root / dataset.base_folder
    missing = [name for name in _published(dataset) if not (home / name).exists()]
    if missing and not settings.download and not _cache_of(dataset, root).exists():
        raise _missing(dataset, root, missing)


def _missing(dataset: type[CIFAR10], root: Path, names: list[str]) -> UserError:
    return UserError(
        f"{dataset.__name__} is not in {root}: {root / dataset.base_folder} has no "
        f"{abbreviate(names)}; set dataset.root=FOLDER to a folder that holds "
        f"{dataset.base_folder}, or "
        "dataset.download=true where there is a network"
    )


def _cifar_split(batches: list[dict[str, Any]]) -> Split:
    images = np.concatenate([batch["data"] for batch in batches])
    kind = "labels" if "labels" in batches[0] else "fine_labels"
    labels = [label for batch in batches for label in batch[kind]]
    shape = (-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return Split(torch.from_numpy(images.reshape(shape)), torch.tensor(labels))


def _cache_of(dataset: type[CIFAR10], root: Path) -> Path:
    return root / f"{dataset.base_folder}.safetensors"


def _published(dataset: type[CIFAR10]) -> dict[str, str]:
    """Return each published file's MD5 digest, by its name."""
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    return dict([*dataset.train_list, *dataset.test_list, meta])


class Files(NamedTuple):
    """The content of the files of the published digest, and the names of the others."""

    whole: dict[str, bytes]
    missing: list[str]
    differing: list[str]


def _read_files(dataset: type[CIFAR10], root: Path) -> Files:
    files = Files({}, [], [])
    for name, md5 in _published(dataset).items():
        path = root / dataset.base_folder / name
        try:
            content = read_bounded(path, MOST_BYTES, follow=True)
        except FileNotFoundError:
            files.missing.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        except ValueError:  # not a regular file, or far too large
            files.differing.append(name)
        else:
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                files.whole[name] = content
            else:
                files.differing.append(name)
    return files


def _download_once(dataset: type[CIFAR10], root: Path) -> Files:
    """Download what is missing, one process at a time; never over a file that is there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset.base_folder}.lock"), _socket_timeout(DOWNLOAD_TIMEOUT):
            # Another process may have brought the files while this one waited.
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
    """Bring the files ``names`` into ``root``, each whole, whenever the process is killed."""
    part, home = root / f".{dataset.base_folder}.part", root / dataset.base_folder
    download_and_extract_archive(
        dataset.url, root, part, filename=dataset.filename, md5=dataset.tgz_md5
    )
    home.mkdir(exist_ok=True)
    for name in names:
        (part / dataset.base_folder / name).replace(home / name)
    shutil.rmtree(part)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let new sockets give up after ``seconds`` of silence; torchvision sets no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
