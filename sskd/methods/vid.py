"""VID: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019.

The teacher's map is modelled as a Gaussian: its mean is regressed from the student's map, its
variance is learned, one for each channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.settings import Positive


@in_float32
def vid_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of ``target``, without the constant of a Gaussian.

    Args:
        mean: [B, c, h, w], of the Gaussian.
        target: [B, c, h, w], the teacher's map.
        variance: [c], of the Gaussian, positive.

    Returns:
        A scalar, float32. It is smallest if the mean is the target, and can be negative.
    """
    channel = variance[:, None, None]
    return 0.5 * ((mean - target).square() / channel + channel.log()).mean()


class Gaussian(nn.Module):
    """The distribution of the teacher's map at the end of one stage, given the student's map."""

    def __init__(
        self, channels: int, teacher_channels: int, variance: float, min_variance: float
    ) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.min_variance = min_variance
        above = variance - min_variance
        start = above + math.log(-math.expm1(-above))  # the inverse of the softplus in forward
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), start))

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """Return the loss of two maps [B, c, h, w]; the larger is pooled to the smaller."""
        student_map, target = pool_to_smaller(student_map, teacher_map)
        variance = F.softplus(self.raw_variance) + self.min_variance
        return vid_loss(self.mean(student_map), target, variance)


class VID(KD):
    """Maximise the likelihood of the teacher's maps given the student's, at every stage's end."""

    terms = (*KD.terms, "vid")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(
        self,
        networks: Networks,
        *,
        variance: Positive,
        smallest_variance: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        if variance <= smallest_variance:
            raise UserError(
                f"method.variance={variance}: must be above method.smallest_variance, "
                f"{smallest_variance}"
            )
        self.gaussians = nn.ModuleList(
            Gaussian(student[0], teacher[0], variance, smallest_variance)
            for student, teacher in networks.stage_shapes()
        )
        self.adapters = (self.gaussians,)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``vid``, the sum over the stages."""
        stages = zip(self.gaussians, outputs.student.stages, outputs.teacher.stages, strict=True)
        losses = [gaussian(student, teacher) for gaussian, student, teacher in stages]
        return {"vid": torch.stack(losses).sum()}
