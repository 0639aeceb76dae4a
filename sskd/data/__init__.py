"""Datasets as tensors, and the loader that augments them where they lie."""

from __future__ import annotations

from sskd.data.images import (
    Images,
    Split,
    add_label_noise,
    channel_statistics,
    hold_out,
    keep_fraction,
)
from sskd.data.loader import CROPS, Batch, Loader, plain
from sskd.data.reading import flaw
from sskd.data.settings import DatasetSettings
from sskd.data.sources import SOURCES
from sskd.errors import UserError

__all__ = [
    "CROPS",
    "SOURCES",
    "Batch",
    "DatasetSettings",
    "Images",
    "Loader",
    "Split",
    "load_images",
    "plain",
]


def load_images(settings: DatasetSettings) -> Images:
    """Load a dataset, then hold out, keep a fraction and make labels wrong, in this order.

    ``mean`` and ``std`` that are not given are those of all training images.
    Raises UserError for files that are missing or broken.
    """
    source = SOURCES[settings.source].load(settings)
    if told := flaw(source):
        raise UserError(
            f"dataset={settings.source}, {settings.root}: {told}; give a folder of whole files "
            "with dataset.root=FOLDER"
        )
    classes, train, test = source
    # Before any choice, so that a student of few images sees them as its teacher does.
    mean, std = _normalisation(settings, train)
    train, holdout = hold_out(train, classes, settings.holdout, settings.seed)
    train = keep_fraction(train, len(classes), settings.fraction, settings.seed)
    train = add_label_noise(train, len(classes), settings.label_noise, settings.seed)
    return Images(
        name=settings.name,
        classes=classes,
        train=train,
        test=test,
        holdout=holdout,
        mean=mean,
        std=std,
    )


def _normalisation(
    settings: DatasetSettings, train: Split
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the deviation that are given, else those of ``train``."""
    if settings.mean is not None and settings.std is not None:
        return tuple(settings.mean), tuple(settings.std)
    mean, std = channel_statistics(train.images)
    return tuple(settings.mean or mean), tuple(settings.std or std)
