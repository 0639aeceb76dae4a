"""CIFAR-100 and CIFAR-10; the digests of the published files are checked before they are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import download_and_extract_archive

from sskd.data.images import Split
from sskd.data.published_files import PublishedFiles, refuse_other_size
from sskd.data.reading import Source
from sskd.data.settings import DatasetSettings

CIFAR_SIZE = 32


def load_cifar100(settings: DatasetSettings) -> Source:
    """Load CIFAR-100: 50,000 training and 10,000 test images (Krizhevsky, 2009)."""
    refuse_other_size(settings, "CIFAR", CIFAR_SIZE)
    return _files(CIFAR100).load(settings)


def load_cifar10(settings: DatasetSettings) -> Source:
    """Load CIFAR-10: 50,000 training and 10,000 test images (Krizhevsky, 2009)."""
    refuse_other_size(settings, "CIFAR", CIFAR_SIZE)
    return _files(CIFAR10).load(settings)


def refuse_missing_cifar100(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _files(CIFAR100).refuse_missing(settings)


def refuse_missing_cifar10(settings: DatasetSettings) -> None:
    """Raise UserError if there are no files to load and no download is allowed."""
    _files(CIFAR10).refuse_missing(settings)


def _files(dataset: type[CIFAR10]) -> PublishedFiles:
    """Return the files that ``dataset`` lists."""
    meta = (dataset.meta["filename"], dataset.meta["md5"])

    def fetch(root: Path, part: Path) -> None:
        download_and_extract_archive(
            dataset.url, root, part, filename=dataset.filename, md5=dataset.tgz_md5
        )

    def parse(contents: dict[str, bytes]) -> Source:
        content = {
            name: pickle.loads(contents.pop(name), encoding="latin1") for name in [*contents]
        }
        classes = content[dataset.meta["filename"]][dataset.meta["key"]]
        train, test = (
            _to_split([content[name] for name, _ in batches])
            for batches in (dataset.train_list, dataset.test_list)
        )
        return Source(tuple(classes), train, test)

    return PublishedFiles(
        name=dataset.__name__,
        folder=dataset.base_folder,
        digests=dict([*dataset.train_list, *dataset.test_list, meta]),
        url=dataset.url,
        fetch=fetch,
        parse=parse,
        cache=f"{dataset.base_folder}.safetensors",
    )


def _to_split(batches: list[dict[str, Any]]) -> Split:
    images = np.concatenate([batch["data"] for batch in batches])
    key = "labels" if "labels" in batches[0] else "fine_labels"
    labels = [label for batch in batches for label in batch[key]]
    shape = (-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return Split(torch.from_numpy(images.reshape(shape)), torch.tensor(labels))
