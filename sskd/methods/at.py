"""AT: Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer", ICLR 2017, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import pool_to_smaller, stage_shapes
from sskd.methods.base import in_float32
from sskd.methods.kd import KD
from sskd.models import Features


def attention(maps: Tensor) -> Tensor:
    """Return where [B, c, h, w] is active: the mean square over the channels, as unit rows.

    [B, h * w], which no positive factor of ``maps`` changes.
    """
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)


@in_float32
def at_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of two maps' attention (equation 2, for one layer).

    The maps, [B, c, h, w], may differ in their channels, and in their size: the larger is
    average-pooled to the smaller. A scalar, float32, blind to a positive factor of either map.
    """
    student_map, teacher_map = pool_to_smaller(student_map, teacher_map)
    return F.mse_loss(attention(student_map), attention(teacher_map))


class AT(KD):
    """Attend to the same places as the teacher, at the end of every stage."""

    terms = (*KD.terms, "at")

    def __init__(self, student: nn.Module, teacher: nn.Module, data: Images, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        stage_shapes(student, teacher, data)  # refuses networks that do not match

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``at``, the sum over the stages."""
        losses = map(at_loss, student.stages, teacher.stages)
        return {"at": torch.stack(list(losses)).sum()}
