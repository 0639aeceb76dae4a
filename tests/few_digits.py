"""Scikit-learn's digits with 30 test images instead of 356, read once in each process.

The runs in tests train on about 40 images, and would spend more time on 356 test images than on
those. A test that needs all test images uses the fixture ``all_digits`` (conftest.py).
"""

from __future__ import annotations

import torch

from sskd.data import SOURCES, DatasetSettings
from sskd.data.images import Split
from sskd.data.labelled import LabelledImages
from sskd.data.reading import Source

ALL = SOURCES["digits"]
IMAGES_OF_A_CLASS = 3
_sources: dict[int, Source] = {}  # by the height and width in pixels


def install() -> None:
    """Let this process read only these test images from now on."""
    SOURCES["digits"] = ALL._replace(load=load)


def load(settings: DatasetSettings) -> Source:
    """Return the digits with three test images of each class."""
    if settings.size not in _sources:
        _sources[settings.size] = _with_few_test_images(ALL.load(settings))
    source = _sources[settings.size]
    return source._replace(train=_copy(source.train), test=_copy(source.test))


def _with_few_test_images(source: Source) -> Source:
    labels = source.test.labels
    rank = torch.stack([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    return source._replace(test=source.test.take((rank < IMAGES_OF_A_CLASS).nonzero()[:, 0]))


def _copy(split: LabelledImages) -> Split:
    return Split(split.images.clone(), split.labels.clone())
