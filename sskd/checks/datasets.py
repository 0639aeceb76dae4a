"""What holds for every dataset."""

from __future__ import annotations

import torch

from sskd.checks import require
from sskd.data import SOURCES, DatasetSettings
from sskd.data.reading import Source, find_problem

_BATCH = 256  # images that are checked at once


def check_images(settings: DatasetSettings, size: int) -> None:
    """Check types, shapes and labels of both parts, at ``size`` pixels on each side.

    Raises:
        UserError: the dataset does not have images of this size.
    """
    source = _load(settings.model_copy(update={"size": size}))
    problem = find_problem(source)
    require(problem is None, str(problem))
    for name, split in (("train", source.train), ("test", source.test)):
        for images, labels in split.pixel_batches(_BATCH):
            shape, kind = tuple(images.shape), images.dtype
            expected = (len(labels), 3, size, size)
            require(kind == torch.uint8, f"{name}: images are {kind}, not uint8")
            require(shape == expected, f"{name}: images have shape {shape}, not {expected}")
        require(split.labels.dtype == torch.int64, f"{name}: labels are not int64")


def check_repeatable(settings: DatasetSettings) -> None:
    """Check that two loads give the same images, in the same order, and the same digest."""
    first, second = _load(settings), _load(settings)
    for one, other in ((first.train, second.train), (first.test, second.test)):
        batches = zip(one.pixel_batches(_BATCH), other.pixel_batches(_BATCH), strict=True)
        same = all(torch.equal(x, y) for (x, _), (y, _) in batches)
        require(same, "two loads give different images")
        require(torch.equal(one.labels, other.labels), "two loads give different labels")
    digest = SOURCES[settings.source].digest
    require(digest(settings) == digest(settings), "the digest changes by itself")


def check_classes(settings: DatasetSettings) -> None:
    """Check that each class has a training image."""
    source = _load(settings)
    empty = [name for label, name in enumerate(source.classes) if not _has(source, label)]
    require(not empty, f"no training image of {', '.join(map(repr, empty[:5]))}")


def _load(settings: DatasetSettings) -> Source:
    return SOURCES[settings.source].load(settings)


def _has(source: Source, label: int) -> bool:
    return bool((source.train.labels == label).any())
