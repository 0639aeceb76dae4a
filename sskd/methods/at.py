"""AT: Zagoruyko & Komodakis, "Paying More Attention to Attention: Improving the Performance of
Convolutional Neural Networks via Attention Transfer", ICLR 2017, section 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.stage_by_stage import StageByStage, sum_over_stages


def attention(maps: Tensor) -> Tensor:
    """Return the normalised attention map Q / |Q| of [B, c, h, w]: unit vectors [B, h * w].

    Q is the mean of the squared channels at each position. The paper sums them, which is the same
    after the normalisation.
    """
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)


@in_float32
def at_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of two attention maps.

    Equation 2 for one layer, with a mean of squares in place of the 2-norm, as in the CRD
    benchmark. The maps are [B, c, h, w]. Their channels may differ, and their sizes: the larger map
    is average-pooled to the smaller. Returns a scalar, float32, which does not change if either map
    is multiplied by a positive factor.
    """
    student_map, teacher_map = pool_to_smaller(student_map, teacher_map)
    return F.mse_loss(attention(student_map), attention(teacher_map))


class AT(StageByStage):
    """Compare the attention maps at the end of every stage."""

    terms = (*KD.terms, "at")

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``at``, the sum over the stages."""
        return {"at": sum_over_stages(at_loss, outputs)}
