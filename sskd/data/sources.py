"""The datasets: CIFAR-100, CIFAR-10, handwritten digits, and any folder of images by class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from sskd.data.cifar import cifar10, cifar100
from sskd.data.images import Split
from sskd.data.reading import Source, absolute, one_line, some
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError

DIGITS_TEST_EVERY = 5
DIGITS_WHITE = 16


def digits(settings: DatasetSettings) -> Source:
    """Scikit-learn's 1,797 handwritten digits, scaled up; every fifth of a class is a test image.

    The images are 8x8 with values 0 to 16 (Alpaydin and Kaynak, UCI, 1998), class by class
    in the order of scikit-learn's file.
    """
    # Importing it takes half a second, which the other sources should not.
    from sklearn.datasets import load_digits

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
    root = absolute(settings.root)
    train, test = _list_folder(root / "train"), _list_folder(root / "test")
    differing = set(train.classes) ^ set(test.classes)
    if differing:
        raise UserError(
            f"{root}: train and test must have the same classes, but only one of them has "
            f"{some(sorted(differing))}"
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
    root = absolute(settings.root)
    paths = [path for part in ("train", "test") for path in _paths(root / part)]
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        line = f"{path.relative_to(root)} {path.stat().st_size}\n"
        digest.update(os.fsencode(line))  # a name may be of another encoding than text
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


def _list_folder(path: Path) -> ImageFolder:
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; set dataset.root=FOLDER to one that holds "
            "train/CLASS and test/CLASS"
        )
    try:
        list(_paths(path))
        return ImageFolder(path)
    except OSError as error:
        raise UserError(f"{path}: {one_line(error)}") from error


def _paths(root: Path) -> Iterator[Path]:
    """Yield all that lies below ``root`` and is no folder; links are followed, as ImageFolder does.

    Raises:
        UserError: two names lead to one folder. Its images would count twice, and a few links
            that lead back are as good as folders without end.
    """
    seen: dict[tuple[int, int], Path] = {}
    walk = os.walk(root, onerror=_refuse, followlinks=True) if root.is_dir() else ()
    for name, _, files in walk:
        folder = Path(name)
        status = folder.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder and status.st_ino:  # some systems number no folder
            raise UserError(f"{folder}: is the same folder as {first}; remove the link")
        yield from (folder / file for file in files)


def _refuse(error: OSError) -> None:
    raise error  # os.walk would leave the folder out


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
        if not Path(path).is_file():  # a pipe would wait for ever
            raise ValueError("it is no file")
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
        raise UserError(f"{path} cannot be read as an image: {one_line(error)}") from error
