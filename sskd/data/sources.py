"""The datasets: CIFAR-100, CIFAR-10, handwritten digits, and any folder of images by class."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from sskd.data.images import Split
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError

DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
CIFAR_SIZE = 32
DIGITS_TEST_EVERY = 5
DIGITS_WHITE = 16


class Source(NamedTuple):
    """A dataset as it is published, before any choice."""

    classes: tuple[str, ...]
    train: Split
    test: Split


def cifar100(settings: DatasetSettings) -> Source:
    """CIFAR-100 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR100, settings)


def cifar10(settings: DatasetSettings) -> Source:
    """CIFAR-10 of 50,000 and 10,000 images (Krizhevsky, 2009)."""
    return _cifar(CIFAR10, settings)


def digits(settings: DatasetSettings) -> Source:
    """Scikit-learn's 1,797 handwritten digits, scaled up; every fifth of a class is a test image.

    The images are 8x8 with values 0 to 16 (Alpaydin and Kaynak, UCI, 1998), class by class
    in the order of scikit-learn's file.
    """
    data = load_digits()
    grey = F.interpolate(
        torch.from_numpy(data.images)[:, None], size=settings.size, mode="bilinear"
    )
    images = (grey * 255 / DIGITS_WHITE).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target).long()
    whole = Split(images.contiguous(), labels)
    is_test = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(len(data.target_names)):
        members = (labels == label).nonzero()[:, 0]
        is_test[members[DIGITS_TEST_EVERY - 1 :: DIGITS_TEST_EVERY]] = True
    return Source(
        tuple(str(name) for name in data.target_names),
        whole.take((~is_test).nonzero()[:, 0]),
        whole.take(is_test.nonzero()[:, 0]),
    )


def folder(settings: DatasetSettings) -> Source:
    """Images in ``root/train/CLASS`` and ``root/test/CLASS``, the same classes in both."""
    root = _absolute(settings.root)
    train, test = _list_folder(root / "train"), _list_folder(root / "test")
    differing = set(train.classes) ^ set(test.classes)
    if differing:
        raise UserError(
            f"{root}: train and test must have the same classes, but only one of them has "
            f"{_some(sorted(differing))}"
        )
    return Source(
        tuple(train.classes), _read_folder(train, settings.size), _read_folder(test, settings.size)
    )


def fixed(settings: DatasetSettings) -> str | None:
    """Return None: the content of a published dataset is always the same."""
    return None


def folder_fingerprint(settings: DatasetSettings) -> str | None:
    """Return the SHA-256 of the names and sizes of a folder's files, read off without opening any.

    It tells two folders of one name apart, and a folder before and after images were added.
    """
    root = _absolute(settings.root)
    digest = hashlib.sha256()
    for path in sorted(path for part in ("train", "test") for path in (root / part).rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


class Reader(NamedTuple):
    """How a source is loaded, and what tells the content of two loads apart."""

    load: Callable[[DatasetSettings], Source]
    fingerprint: Callable[[DatasetSettings], str | None]


SOURCES: dict[str, Reader] = {
    "cifar100": Reader(cifar100, fixed),
    "cifar10": Reader(cifar10, fixed),
    "digits": Reader(digits, fixed),
    "folder": Reader(folder, folder_fingerprint),
}


def _cifar(dataset: type[CIFAR10], settings: DatasetSettings) -> Source:
    if settings.size != CIFAR_SIZE:
        raise UserError(
            f"dataset.size={settings.size}: CIFAR's images have {CIFAR_SIZE} pixels a side; "
            f"set dataset.size={CIFAR_SIZE}"
        )
    root = _absolute(settings.root)
    missing, differing = _compare_digests(dataset, root)
    if settings.download and (missing or differing):
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
            f"{dataset.__name__} is not in {root}: {home} has no {_some(missing)}; set "
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


def _compare_digests(dataset: type[CIFAR10], root: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that are missing, and of those not of the published digest."""
    meta = (dataset.meta["filename"], dataset.meta["md5"])
    missing, differing = [], []
    for name, md5 in [*dataset.train_list, *dataset.test_list, meta]:
        path = root / dataset.base_folder / name
        try:
            if not path.exists():
                missing.append(name)
            elif not check_integrity(path, md5):
                differing.append(name)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
    return missing, differing


def _download_once(dataset: type[CIFAR10], root: Path) -> tuple[list[str], list[str]]:
    """Download what is missing, one process at a time; never over a file that is there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{dataset.base_folder}.lock"), _socket_timeout(DOWNLOAD_TIMEOUT):
            # Another process may have brought the files while this one waited.
            missing, differing = _compare_digests(dataset, root)
            if missing and not differing:
                dataset(root, download=True)
                missing, differing = _compare_digests(dataset, root)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(
            f"{dataset.__name__} could not be downloaded from {dataset.url} to {root}: "
            f"{_one_line(error)}; set dataset.root=FOLDER to a folder that holds "
            f"{dataset.base_folder}"
        ) from error
    return missing, differing


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Let new sockets give up after ``seconds`` of silence; torchvision sets no limit itself."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _list_folder(path: Path) -> ImageFolder:
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; set dataset.root=FOLDER to one that holds "
            "train/CLASS and test/CLASS"
        )
    try:
        return ImageFolder(path)
    except OSError as error:
        raise UserError(f"{path}: {_one_line(error)}") from error


def _read_folder(listing: ImageFolder, size: int) -> Split:
    images = torch.empty(len(listing), 3, size, size, dtype=torch.uint8)
    # Pillow lets go of the interpreter lock while it decodes and scales.
    with ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda sample: _read_image(sample[0], size), listing.samples)
        progress = tqdm(decoded, str(listing.root), len(listing), unit="image", disable=None)
        for position, image in enumerate(progress):
            images[position] = image
    return Split(images, torch.tensor(listing.targets))


def _read_image(path: str, size: int) -> Tensor:
    """Read an image upright, scaled to cover a square and cut to it: uint8 [3, size, size]."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel; convert it to 8")
            # A camera's note of how it was held must not pass for a rotation of the scene.
            upright = ImageOps.exif_transpose(image).convert("RGB")
        square = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
        pixels: Tensor = pil_to_tensor(square)
        return pixels
    # Pillow's decoders raise errors of almost any class on a broken file; its limit on an
    # image's pixels is one of them.
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image: {_one_line(error)}") from error


def _absolute(root: str) -> Path:
    return Path(root).expanduser().absolute()


def _some(names: list[str], most: int = 5) -> str:
    """Join the first names, so that a message stays a line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
