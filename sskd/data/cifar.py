"""CIFAR-100 and CIFAR-10: read by torchvision, after their digests were checked.

The first load leaves a cache beside the published files, from which later ones read.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from sskd.data.cache import read_cache, write_cache
from sskd.data.images import Split
from sskd.data.reading import Source, absolute, one_line, some
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
CIFAR_SIZE = 32


def cifar100(settings: DatasetSettings) -> Source:
    """CIFAR-100 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR100, settings)


def cifar10(settings: DatasetSettings) -> Source:
    """CIFAR-10 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR10, settings)


def _cifar(dataset: type[CIFAR10], settings: DatasetSettings) -> Source:
    if settings.size != CIFAR_SIZE:
        raise UserError(
            f"dataset.size={settings.size}: CIFAR's images have {CIFAR_SIZE} pixels a side; "
            f"set dataset.size={CIFAR_SIZE}"
        )
    root = absolute(settings.root)
    cache, published = root / f"{dataset.base_folder}.safetensors", _published(dataset)
    source = read_cache(cache, published)
    if source is None:
        source = _read_published(dataset, root, settings.download)
        write_cache(cache, published, source)
    return source


def _read_published(dataset: type[CIFAR10], root: Path, download: bool) -> Source:
    missing, differing = _compare_digests(dataset, root)
    if download and (missing or differing):
        missing, differing = _download_once(dataset, root)
    home = root / dataset.base_folder
    if differing:
        raise UserError(
            f"{home / differing[0]} differs from the published file (another MD5 digest), it "
            "may be cut short; move it away and load again with dataset.download=true, or set "
            "dataset.root=FOLDER to a whole copy's"
        )
    if missing:
        raise UserError(
            f"{dataset.__name__} is not in {root}: {home} has no {some(missing)}; set "
            f"dataset.root=FOLDER to a folder that holds {dataset.base_folder}, or "
            "dataset.download=true where there is a network"
        )
    # The files are pickles. torchvision compares every file's MD5 digest with the published one
    # before it unpickles any, whether or not it downloads (0.29.2, torchvision/datasets/cifar.py:
    # CIFAR10.__init__ calls _check_integrity first, _load_meta calls check_integrity).
    train, test = dataset(root, train=True), dataset(root, train=False)
    return Source(tuple(train.classes), _cifar_split(train), _cifar_split(test))


def _cifar_split(dataset: CIFAR10) -> Split:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(dataset.targets))


def _published(dataset: type[CIFAR10]) -> dict[str, str]:
    """Return each published file's MD5 digest, by its name."""
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    return dict([*dataset.train_list, *dataset.test_list, meta])


def _compare_digests(dataset: type[CIFAR10], root: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that are missing, and of those not of the published digest."""
    missing, differing = [], []
    for name, md5 in _published(dataset).items():
        path = root / dataset.base_folder / name
        try:
            if not path.exists():
                missing.append(name)
            elif not check_integrity(path, md5):
                differing.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    return missing, differing


def _download_once(dataset: type[CIFAR10], root: Path) -> tuple[list[str], list[str]]:
    """Download what is missing, one process at a time; never over a file that is there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset.base_folder}.lock"), _socket_timeout(DOWNLOAD_TIMEOUT):
            # Another process may have brought the files while this one waited.
            missing, differing = _compare_digests(dataset, root)
            if missing and not differing:
                _download(dataset, root, missing)
                missing, differing = _compare_digests(dataset, root)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"{dataset.__name__} could not be downloaded from {dataset.url} to {root}: "
            f"{one_line(error)}; set dataset.root=FOLDER to a folder that holds "
            f"{dataset.base_folder}"
        ) from error
    return missing, differing


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
