"""The datasets by name: published ones, handwritten digits, and any folder of images by class."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distribution
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sskd.data.cifar import (
    load_cifar10,
    load_cifar100,
    refuse_missing_cifar10,
    refuse_missing_cifar100,
)
from sskd.data.folder import (
    folder_digest,
    load_folder,
    names_and_sizes,
    refuse_missing_folder,
)
from sskd.data.imagenet import imagenet_digest, load_imagenet, refuse_missing_imagenet
from sskd.data.images import Split
from sskd.data.reading import Source
from sskd.data.settings import Crop, DatasetSettings
from sskd.data.stl10 import load_stl10, refuse_missing_stl10
from sskd.data.svhn import load_svhn, refuse_missing_svhn
from sskd.data.tiny_imagenet import (
    load_tiny_imagenet,
    refuse_missing_tiny_imagenet,
    tiny_imagenet_digest,
)

DIGITS_CLASSES = 10
DIGITS_SIZE = (8, 8)
DIGITS_TEST_EVERY = 5
DIGITS_WHITE = 16


def load_digits(settings: DatasetSettings) -> Source:
    """Load scikit-learn's 1,797 handwritten digits; every fifth image of a class is a test image.

    The images are 8x8 with values 0 to 16 (Alpaydin and Kaynak, UCI, 1998), in the order of
    scikit-learn's file, and are scaled up to ``settings.size``.
    """
    # Importing scikit-learn takes a quarter of a short run, much longer than reading the file.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(file), delimiter=","))
    pixels, labels = rows[:, :-1].view(-1, 1, *DIGITS_SIZE), rows[:, -1].long()
    grey = F.interpolate(pixels, size=settings.size, mode="bilinear")
    images = (grey * 255 / DIGITS_WHITE).round().to(torch.uint8).expand(-1, 3, -1, -1)
    everything = Split(images.contiguous(), labels)
    is_test = torch.zeros(len(everything), dtype=torch.bool)
    for label in range(DIGITS_CLASSES):
        members = (labels == label).nonzero()[:, 0]
        is_test[members[DIGITS_TEST_EVERY - 1 :: DIGITS_TEST_EVERY]] = True
    return Source(
        tuple(str(label) for label in range(DIGITS_CLASSES)),
        everything.take((~is_test).nonzero()[:, 0]),
        everything.take(is_test.nonzero()[:, 0]),
    )


def no_digest(settings: DatasetSettings) -> str | None:
    """Return None: the content of a published dataset never changes."""
    return None


def never_missing(settings: DatasetSettings) -> None:
    """Do nothing: the data are part of a dependency, or loading reports what is missing."""


class Reader(NamedTuple):
    """The functions of a source.

    ``load`` reads it. ``digest`` distinguishes its contents; None if they never change.
    ``refuse_missing`` raises UserError if there is nothing to load, without reading any image.
    ``earlier_digest`` is the digest that earlier versions of the suite computed; None if
    no run of those versions can have used the same images. ``crops`` are the values of
    ``dataset.crop`` that it supports.
    """

    load: Callable[[DatasetSettings], Source]
    digest: Callable[[DatasetSettings], str | None]
    refuse_missing: Callable[[DatasetSettings], None] = never_missing
    earlier_digest: Callable[[DatasetSettings], str | None] = no_digest
    crops: tuple[Crop, ...] = ("padded",)


SOURCES: dict[str, Reader] = {
    "cifar100": Reader(load_cifar100, no_digest, refuse_missing_cifar100),
    "cifar10": Reader(load_cifar10, no_digest, refuse_missing_cifar10),
    "stl10": Reader(load_stl10, no_digest, refuse_missing_stl10),
    "svhn": Reader(load_svhn, no_digest, refuse_missing_svhn),
    "tiny_imagenet": Reader(load_tiny_imagenet, tiny_imagenet_digest, refuse_missing_tiny_imagenet),
    "digits": Reader(load_digits, no_digest),
    "imagenet": Reader(load_imagenet, imagenet_digest, refuse_missing_imagenet, crops=("resized",)),
    "folder": Reader(
        load_folder,
        folder_digest,
        refuse_missing_folder,
        names_and_sizes,
        crops=("padded", "resized"),
    ),
}
