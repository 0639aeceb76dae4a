"""STL-10 (Coates, Ng & Lee, AISTATS 2011); the digests of its files are checked first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import STL10
from torchvision.datasets.utils import download_and_extract_archive

from sskd.data.images import Split
from sskd.data.published_files import PublishedFiles
from sskd.data.reading import Source
from sskd.data.settings import DatasetSettings

STL10_SIZE = 96
CLASSES = (
    *("airplane", "bird", "car", "cat", "deer"),
    *("dog", "horse", "monkey", "ship", "truck"),
)
LABELLED = 2  # of the files of the training part; the third one holds images without labels
_AT_ONCE = 500  # images that are scaled together


def load_stl10(settings: DatasetSettings) -> Source:
    """Load STL-10: 5,000 training and 8,000 test images of 96x96, scaled to ``settings.size``."""
    return _files(settings.size).load(settings)


def refuse_missing_stl10(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _files(settings.size).refuse_missing(settings)


def scale(images: Tensor, size: int) -> Tensor:
    """Scale uint8 images [N, 3, h, w] to ``size``, bilinearly and without aliasing.

    This is what Pillow and torchvision's ``Resize`` do.
    """
    if images.shape[-1] == size:
        return images
    scaled = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        for part in images.split(_AT_ONCE)
    ]
    return torch.cat([part.round().clamp(0, 255).byte() for part in scaled])


def _files(size: int) -> PublishedFiles:
    train, test = STL10.train_list[:LABELLED], STL10.test_list

    def fetch(root: Path, part: Path) -> None:
        download_and_extract_archive(
            STL10.url, root, part, filename=STL10.filename, md5=STL10.tgz_md5
        )

    def parse(contents: dict[str, bytes]) -> Source:
        train_split, test_split = (
            _to_split(contents.pop(pixels), contents.pop(labels), size)
            for (pixels, _), (labels, _) in (train, test)
        )
        return Source(CLASSES, train_split, test_split)

    return PublishedFiles(
        name="STL10",
        folder=STL10.base_folder,
        digests=dict([*train, *test]),
        url=STL10.url,
        fetch=fetch,
        parse=parse,
        cache=f"{STL10.base_folder}-{size}.safetensors",
    )


def _to_split(pixels: bytes, labels: bytes, size: int) -> Split:
    """Return the images in ``pixels``, stored column by column, and their labels, from 1."""
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 3, STL10_SIZE, STL10_SIZE)
    upright = torch.from_numpy(images.transpose(0, 1, 3, 2).copy())
    numbers = torch.from_numpy(np.frombuffer(labels, np.uint8).astype(np.int64) - 1)
    return Split(scale(upright, size), numbers)
