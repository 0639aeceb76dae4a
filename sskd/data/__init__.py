"""Datasets, in memory or packed into a file, and the loaders of their batches."""

from __future__ import annotations

from sskd.data.augmentation import CROPS, JIGSAWS, ONE_VIEW, Views
from sskd.data.batches import Batch, EpochLoader
from sskd.data.images import (
    Images,
    Split,
    add_label_noise,
    channel_statistics,
    hold_out,
    keep_fraction,
)
from sskd.data.labelled import LabelledImages
from sskd.data.loader import Loader, eval_batches
from sskd.data.reading import find_problem
from sskd.data.settings import DatasetSettings
from sskd.data.sources import SOURCES
from sskd.data.strong import StrongAugmentation
from sskd.data.transformations import TRANSFORMATIONS, Transformations
from sskd.distributed.share import WHOLE, Share
from sskd.errors import UserError

__all__ = [
    "CROPS",
    "JIGSAWS",
    "ONE_VIEW",
    "SOURCES",
    "TRANSFORMATIONS",
    "WHOLE",
    "Batch",
    "DatasetSettings",
    "EpochLoader",
    "Images",
    "LabelledImages",
    "Loader",
    "Share",
    "Split",
    "StrongAugmentation",
    "Transformations",
    "Views",
    "eval_batches",
    "load_images",
    "refuse_missing",
]


def refuse_missing(settings: DatasetSettings) -> None:
    """Raise UserError if there is obviously nothing to load; no image is read."""
    SOURCES[settings.source].refuse_missing(settings)


def load_images(settings: DatasetSettings, digest: str | None = None) -> Images:
    """Load a dataset, then hold out, keep a fraction and add label noise, in this order.

    A ``mean`` or ``std`` that is not given is computed from all training images (packed: a sample).

    Args:
        digest: the digest in the run's configuration; None without a run.

    Raises:
        UserError: files are missing or broken, or the content that was read has another
            digest.
    """
    source = SOURCES[settings.source].load(settings)
    found = source.digest or SOURCES[settings.source].digest(settings)
    if digest is not None and digest != found:
        raise UserError(
            f"dataset={settings.source}, {settings.root}: its files changed while the command "
            "started; rerun the command when no other process is writing there"
        )
    if problem := find_problem(source):
        raise UserError(
            f"dataset={settings.source}, {settings.root}: {problem}; give a folder "
            "of complete files with dataset.root=FOLDER"
        )
    classes, train = source.classes, source.train
    # Before the selection, so that a few-shot student has the same normalisation as its teacher.
    mean, std = _normalisation(settings, train)
    train, holdout = hold_out(train, classes, settings.holdout, settings.seed)
    train = keep_fraction(train, len(classes), settings.fraction, settings.seed)
    train = add_label_noise(train, len(classes), settings.label_noise, settings.seed)
    return Images(
        name=settings.name,
        classes=classes,
        train=train,
        test=source.test,
        holdout=holdout,
        mean=mean,
        std=std,
        digest=found,
    )


def _normalisation(
    settings: DatasetSettings, train: LabelledImages
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the given mean and standard deviation, or else those of ``train``."""
    if settings.mean is not None and settings.std is not None:
        return tuple(settings.mean), tuple(settings.std)
    mean, std = channel_statistics(train.sample())
    return tuple(settings.mean or mean), tuple(settings.std or std)
