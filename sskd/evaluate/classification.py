"""Accuracy by class and the confusions of a classifier, from its logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Z_95 = 1.959963984540054  # of a two-sided 95 % interval of the normal distribution


def wilson_interval(percent: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``count`` images, both in percent.

    It covers the choice of the test images, not the training. Wilson, JASA 1927.
    """
    share, square = percent / 100, Z_95**2
    centre = share + square / (2 * count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    low, high = ((centre + sign * half) / (1 + square / count) for sign in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the number of images [C, C] (int64) by their label (row) and prediction (column).

    ``predicted`` and ``labels`` are int64 [N].
    """
    cells = labels * num_classes + predicted
    counts = torch.bincount(cells, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def class_accuracies(matrix: Tensor) -> list[float | None]:
    """Return the accuracy in percent of each class; None for a class without images.

    ``matrix`` is a ``confusion_matrix``.
    """
    images = matrix.sum(1).tolist()
    correct = matrix.diagonal().tolist()
    return [
        100 * hit / count if count else None for hit, count in zip(correct, images, strict=True)
    ]


class Confusion(NamedTuple):
    """Images of the class ``label`` that were predicted as the class ``predicted``."""

    label: int
    predicted: int
    images: int
    percent_of_class: float


def frequent_confusions(matrix: Tensor, most: int) -> list[Confusion]:
    """Return the ``most`` frequent confusions, the largest first; equal ones by their classes.

    ``matrix`` is a ``confusion_matrix``. Fewer are returned if there are fewer.
    """
    classes = len(matrix)
    errors = (matrix - matrix.diagonal().diag()).flatten()
    order = errors.argsort(descending=True, stable=True)[:most].tolist()
    sizes = matrix.sum(1).tolist()
    found = [(*divmod(cell, classes), int(errors[cell])) for cell in order if errors[cell] > 0]
    return [Confusion(a, b, count, 100 * count / sizes[a]) for a, b, count in found]
