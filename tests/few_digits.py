"""Scikit-learn's digits with 60 test images instead of 356, read once in a process.

A run of the tests trains on some 70 images; without this it would spend more time on its test
images than on those. Whoever needs them all asks for the fixture ``all_digits`` (conftest.py).
"""

from __future__ import annotations

from functools import cache

import torch

from sskd.data import SOURCES, DatasetSettings
from sskd.data.images import Split
from sskd.data.reading import Source

ALL = SOURCES["digits"]
OF_A_CLASS = 6


def install() -> None:
    """Let this process read few test images from now on."""
    SOURCES["digits"] = ALL._replace(load=load)


def load(settings: DatasetSettings) -> Source:
    """Return the digits with six test images of each class."""
    source = _read(settings.size)
    return source._replace(train=_copy(source.train), test=_copy(source.test))


@cache
def _read(size: int) -> Source:
    settings = DatasetSettings.model_construct(size=size)  # type: ignore[call-arg]
    source = ALL.load(settings)
    labels = source.test.labels
    rank = torch.stack([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    return source._replace(test=source.test.take((rank < OF_A_CLASS).nonzero()[:, 0]))


def _copy(split: Split) -> Split:
    return Split(split.images.clone(), split.labels.clone())
