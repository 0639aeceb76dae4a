"""SP: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.data import Batch
from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD
from sskd.models import Features


def similarities(maps: Tensor) -> Tensor:
    """Return the products of all samples of [B, ...], [B, B] with unit rows (equations 2, 3)."""
    rows = maps.flatten(1)
    return unit_vectors(rows @ rows.T)


@in_float32
def sp_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of the samples' similarities (equation 4).

    The mean is over all B^2 pairs. The maps, [B, c, h, w], agree in nothing but B. A scalar,
    float32, blind to a rotation of either space and to a factor.
    """
    return F.mse_loss(similarities(student_map), similarities(teacher_map))


class SP(KD):
    """Find the same samples of a batch alike as the teacher does, at the end of the last stage."""

    terms = (*KD.terms, "sp")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``sp``."""
        return {"sp": sp_loss(student.stages[-1], teacher.stages[-1])}
