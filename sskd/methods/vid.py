"""VID: Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019.

The teacher's map is taken for a Gaussian whose mean a regressor reads from the student's map
and whose variance, one for each channel, is learned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods.adapters import pool_to_smaller, stage_shapes
from sskd.methods.base import in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.settings import Positive


@in_float32
def vid_loss(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of ``target``, without its constant.

    Args:
        mean: [B, c, h, w], the Gaussian's.
        target: [B, c, h, w], the teacher's map.
        variance: [c], positive.

    Returns:
        A scalar, float32; least where the mean is the target, and negative for small variances.
    """
    channel = variance[:, None, None]
    return 0.5 * ((mean - target).square() / channel + channel.log()).mean()


class Gaussian(nn.Module):
    """The distribution of one stage's map of the teacher, given the student's."""

    def __init__(
        self, channels: int, teacher_channels: int, variance: float, smallest: float
    ) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.smallest = smallest
        above = variance - smallest
        start = above + math.log(-math.expm1(-above))  # the inverse of the softplus below
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), start))

    def forward(self, student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """Return the loss of the maps [B, c, h, w]; the larger is pooled to the smaller."""
        given, target = pool_to_smaller(student_map, teacher_map)
        return vid_loss(self.mean(given), target, F.softplus(self.raw_variance) + self.smallest)


class VID(KD):
    """Make the teacher's maps likely given the student's, at the end of every stage."""

    terms = (*KD.terms, "vid")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        variance: Positive,
        smallest_variance: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        if variance <= smallest_variance:
            raise UserError(
                f"method.variance={variance}: must be above method.smallest_variance, "
                f"{smallest_variance}"
            )
        self.gaussians = nn.ModuleList(
            Gaussian(ours[0], theirs[0], variance, smallest_variance)
            for ours, theirs in stage_shapes(student, teacher, data)
        )
        self.adapters = (self.gaussians,)

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``vid``, the sum over the stages."""
        stages = zip(self.gaussians, student.stages, teacher.stages, strict=True)
        losses = [gaussian(ours, theirs) for gaussian, ours, theirs in stages]
        return {"vid": torch.stack(losses).sum()}
