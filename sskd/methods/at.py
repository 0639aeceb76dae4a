"""AT: Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer", ICLR 2017, section 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.stage_by_stage import StageByStage


def attention(maps: Tensor) -> Tensor:
    """Return where [B, c, h, w] is active: the mean square over the channels, as unit rows.

    [B, h * w], which no positive factor of ``maps`` changes.
    """
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)


@in_float32
def at_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of two maps' attention.

    That is equation 2 for one layer, its 2-norm as a mean of squares, as in the CRD benchmark.
    The maps, [B, c, h, w], may differ in their channels, and in their size: the larger is
    average-pooled to the smaller. A scalar, float32, blind to a positive factor of either map.
    """
    student_map, teacher_map = pool_to_smaller(student_map, teacher_map)
    return F.mse_loss(attention(student_map), attention(teacher_map))


class AT(StageByStage):
    """Attend to the same places as the teacher, at the end of every stage."""

    terms = (*StageByStage.terms, "at")
    stage_loss = staticmethod(at_loss)
