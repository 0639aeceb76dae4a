"""SVHN, house numbers (Netzer et al., 2011); the digests of its files are checked first."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import SVHN
from torchvision.datasets.utils import download_url

from sskd.data.images import Split
from sskd.data.published_files import PublishedFiles, refuse_other_size
from sskd.data.reading import Source
from sskd.data.settings import DatasetSettings

SVHN_SIZE = 32
CLASSES = tuple("0123456789")
PARTS = ("train", "test")  # without the 531,131 further training images


def load_svhn(settings: DatasetSettings) -> Source:
    """Load SVHN, cropped digits: 73,257 training and 26,032 test images of 32x32."""
    refuse_other_size(settings, "SVHN", SVHN_SIZE)
    return _files().load(settings)


def refuse_missing_svhn(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _files().refuse_missing(settings)


def _files() -> PublishedFiles:
    published = [SVHN.split_list[part] for part in PARTS]

    def fetch(root: Path, part: Path) -> None:
        for url, name, md5 in published:
            download_url(url, part, name, md5)

    def parse(contents: dict[str, bytes]) -> Source:
        train, test = (_to_split(contents.pop(name)) for _, name, _ in published)
        return Source(CLASSES, train, test)

    return PublishedFiles(
        name="SVHN",
        folder="",
        digests={name: md5 for _, name, md5 in published},
        url=published[0][0].rpartition("/")[0],
        fetch=fetch,
        parse=parse,
        cache="svhn.safetensors",
    )


def _to_split(content: bytes) -> Split:
    """Return the images and labels of a MATLAB file; the label 10 is the digit 0."""
    # The import takes a fifth of a second, which the other sources should not pay for.
    from scipy.io import loadmat

    arrays = loadmat(io.BytesIO(content))
    images = torch.from_numpy(np.ascontiguousarray(arrays["X"].transpose(3, 2, 0, 1)))
    labels = torch.from_numpy(arrays["y"].astype(np.int64).reshape(-1) % len(CLASSES))
    return Split(images, labels)
