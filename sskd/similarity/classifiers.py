"""Correlations of the weights of linear classifiers: figure 5 of Xu et al., ECCV 2020."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def weight_correlations(weight: Tensor) -> Tensor:
    """Return the correlations ``[C, C]`` of the classes of a classifier's ``weight`` [C, d].

    They are the cosines of the angles between the classes' weight vectors: the products of the
    vectors, each scaled to length 1.
    """
    unit = F.normalize(weight.double(), dim=1)
    return unit @ unit.T


def correlation_difference(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the absolute difference ``[C, C]`` of the correlations of two classifiers' weights.

    ``student`` is ``[C, d]``, ``teacher`` ``[C, e]``.
    """
    return (weight_correlations(student) - weight_correlations(teacher)).abs()


def mean_difference(difference: Tensor) -> float:
    """Return the mean of ``difference`` [C, C] over all pairs of different classes."""
    classes = len(difference)
    return difference.sum().item() / max(classes * (classes - 1), 1)
