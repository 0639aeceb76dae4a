"""SP: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD, Outputs


def similarities(maps: Tensor) -> Tensor:
    """Return G: the dot products of all pairs of samples of [B, ...], with unit rows.

    [B, B]; equations 2 and 3.
    """
    rows = maps.flatten(1)
    return unit_vectors(rows @ rows.T)


@in_float32
def sp_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of the samples' similarities (equation 4).

    The mean is over all B^2 pairs. The maps are [B, c, h, w] and need to agree in B only. Returns a
    scalar, float32, which does not change if either network's features are rotated or multiplied by
    a factor.
    """
    return F.mse_loss(similarities(student_map), similarities(teacher_map))


class SP(KD):
    """Compare which samples of a batch are similar, at the end of the last stage."""

    terms = (*KD.terms, "sp")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``sp``."""
        maps = self.whole(outputs.student.stages[-1], outputs.teacher.stages[-1])
        return {"sp": sp_loss(*maps)}
