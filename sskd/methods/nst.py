"""NST: Huang & Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
arXiv 1707.01219, 2017: the maximum mean discrepancy (MMD) with a polynomial kernel.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.stage_by_stage import StageByStage, sum_over_stages


def mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean of ``k(x, y) = (x . y)^2`` over all pairs of channels x and y of an image.

    ``first`` is [B, c, p] and ``second`` [B, k, p], p the number of positions; returns a scalar.
    """
    channels, others, positions = first.shape[1], second.shape[1], first.shape[2]
    if positions >= min(channels, others):
        return (first @ second.transpose(1, 2)).square().mean()
    # The same sum over pairs of positions, which are fewer: the last stage of a ResNet-50 has
    # 2048 channels of 16 positions.
    of_positions = [maps.transpose(1, 2) @ maps for maps in (first, second)]
    return (of_positions[0] * of_positions[1]).sum((1, 2)).mean() / (channels * others)


@in_float32
def nst_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the squared MMD between the channels of two maps.

    The maps are [B, c, h, w]. A sample of the two distributions is a channel: its activations at
    all positions, scaled to length 1. The channels may differ, and the sizes: the larger map is
    average-pooled to the smaller. Returns a scalar, float32, not negative, which depends neither on
    the channels' order nor on positive factors.
    """
    student, teacher = (
        F.normalize(maps.flatten(2), dim=2) for maps in pool_to_smaller(student_map, teacher_map)
    )
    within = mean_kernel(teacher, teacher) + mean_kernel(student, student)
    return within - 2 * mean_kernel(student, teacher)


class NST(StageByStage):
    """Compare the distributions of the channels at the end of every stage."""

    terms = (*KD.terms, "nst")

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``nst``, the sum over the stages."""
        return {"nst": sum_over_stages(nst_loss, outputs)}
