"""RKD: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, section 3.2."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.settings import NonNegative


def relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return how the rows of [B, d] lie to each other.

    Returns:
        The distances of all pairs over the mean of those that are not 0, [B, B]; and the
        cosines of all angles, [B, B, B], whose [j, i, k] is that at row j between rows i and k,
        0 where a side has no length.
    """
    sides = features[None, :] - features[:, None]
    distances = sides.norm(dim=2)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    directions = unit_vectors(sides)
    return distances / mean.where(mean > 0, 1), directions @ directions.transpose(1, 2)


@in_float32
def rkd_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25, angle_weight: float = 50
) -> Tensor:
    """Return the weighted smooth-L1 differences of the relations within a batch.

    Distances of pairs (equations 5 to 8) and angles of triplets (equations 9 and 10), each
    averaged over all of them. ``student`` is [B, d], ``teacher`` [B, e]. A scalar, float32,
    blind to a rotation of either space, to a shift and to a positive factor.
    """
    ours, theirs = relations(student), relations(teacher)
    distance, angle = map(F.smooth_l1_loss, ours, theirs)
    return distance_weight * distance + angle_weight * angle


class RKD(KD):
    """Keep the distances and angles between the samples of a batch, in the pooled feature."""

    terms = (*KD.terms, "rkd")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        distance_weight: NonNegative,
        angle_weight: NonNegative,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``rkd``."""
        weights = self.distance_weight, self.angle_weight
        return {"rkd": rkd_loss(student.pooled, teacher.pooled, *weights)}
