"""NST: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
arXiv 1707.01219, 2017: the maximum mean discrepancy with a polynomial kernel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.stage_by_stage import StageByStage


def kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean square of the products of all channels of [B, c, p] and [B, k, p]."""
    channels, others, places = first.shape[1], second.shape[1], first.shape[2]
    if places >= min(channels, others):
        return (first @ second.transpose(1, 2)).square().mean()
    # The same sum over pairs of places: the last stage of a ResNet-50 has 2048 channels of 16.
    between_places = [maps.transpose(1, 2) @ maps for maps in (first, second)]
    return (between_places[0] * between_places[1]).sum((1, 2)).mean() / (channels * others)


@in_float32
def nst_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the discrepancy between two maps' distributions of channels.

    Each channel of the maps, [B, c, h, w], is a sample: where in the image it is active, with
    length 1. The larger map is average-pooled to the smaller; the channels may differ. A
    scalar, float32, not negative, blind to the channels' order and to positive factors.
    """
    ours, theirs = (
        F.normalize(maps.flatten(2), dim=2) for maps in pool_to_smaller(student_map, teacher_map)
    )
    return kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)


class NST(StageByStage):
    """Let the channels be active where the teacher's are, at the end of every stage."""

    terms = (*StageByStage.terms, "nst")
    stage_loss = staticmethod(nst_loss)
