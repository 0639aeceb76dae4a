"""RKD: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, section 3.2."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.settings import NonNegative


def distances_and_angles(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairwise distances and the triplet angles of the rows of [B, d].

    Returns:
        psi_D, [B, B]: the distances divided by mu, the mean of the distances that are not 0.
        psi_A, [B, B, B]: the cosines of the angles. Entry [j, i, k] is the cosine at row j between
        rows i and k, or 0 if row j equals one of them.
    """
    offsets = features[None, :] - features[:, None]
    distances = offsets.norm(dim=2)
    mu = distances.sum() / (distances > 0).sum().clamp(min=1)
    directions = unit_vectors(offsets)
    psi_d = distances / mu.where(mu > 0, 1)
    psi_a = directions @ directions.transpose(1, 2)
    return psi_d, psi_a


@in_float32
def rkd_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 25, angle_weight: float = 50
) -> Tensor:
    """Return the weighted smooth-L1 differences of distances and angles within a batch.

    Distances of pairs (equations 5 to 8) and angles of triplets (equations 9 and 10), each averaged
    over all pairs or triplets. ``student`` is [B, d], ``teacher`` [B, e]. Returns a scalar,
    float32, which does not change if either network's features are rotated, shifted or multiplied
    by a positive factor.
    """
    relations = distances_and_angles(student), distances_and_angles(teacher)
    distance, angle = map(F.smooth_l1_loss, *relations)
    return distance_weight * distance + angle_weight * angle


class RKD(KD):
    """Compare the distances and angles between the samples of a batch, in the pooled feature."""

    terms = (*KD.terms, "rkd")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def __init__(
        self,
        networks: Networks,
        *,
        distance_weight: NonNegative,
        angle_weight: NonNegative,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``rkd``."""
        student, teacher = self.whole(outputs.student.pooled, outputs.teacher.pooled)
        return {"rkd": rkd_loss(student, teacher, self.distance_weight, self.angle_weight)}
