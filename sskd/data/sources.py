"""The datasets: CIFAR-100, CIFAR-10, handwritten digits, and any folder of images by class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sskd.data.cifar import cifar10, cifar100, refuse_missing_cifar10, refuse_missing_cifar100
from sskd.data.folder import folder, folder_fingerprint, names_and_sizes, refuse_missing_folder
from sskd.data.images import Split
from sskd.data.reading import Source
from sskd.data.settings import DatasetSettings

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


def fixed(settings: DatasetSettings) -> str | None:
    """Return None: the content of a published dataset is always the same."""
    return None


def never_missing(settings: DatasetSettings) -> None:
    """Do nothing: the data come with the suite, or loading them says what is missing."""


class Reader(NamedTuple):
    """How a source is loaded, and what tells the content of two loads apart.

    ``refuse_missing`` raises UserError if there is nothing to load, without reading it;
    ``earlier_fingerprint`` is the one of versions before the present one, None if none matches.
    """

    load: Callable[[DatasetSettings], Source]
    fingerprint: Callable[[DatasetSettings], str | None]
    refuse_missing: Callable[[DatasetSettings], None] = never_missing
    earlier_fingerprint: Callable[[DatasetSettings], str | None] = fixed


SOURCES: dict[str, Reader] = {
    "cifar100": Reader(cifar100, fixed, refuse_missing_cifar100),
    "cifar10": Reader(cifar10, fixed, refuse_missing_cifar10),
    "digits": Reader(digits, fixed),
    "folder": Reader(folder, folder_fingerprint, refuse_missing_folder, names_and_sizes),
}
