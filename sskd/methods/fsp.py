"""FSP: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning", CVPR 2017, section 3.

In a first phase the student learns the teacher's flow of solution procedure (FSP): the products of
the channels of one level with those of the next. Then it trains on the labels and the teacher's
logits alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch
from sskd.errors import UserError
from sskd.methods.adapters import pool_to_smaller
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD
from sskd.methods.networks import Networks, modules_behind
from sskd.models import Features
from sskd.schedule import PhaseSettings


def fsp_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the mean products of the channels of two levels (equation 1).

    [B, c, h, w] and [B, k, H, W] to [B, c, k]; the larger map is average-pooled to the smaller.
    """
    lower, upper = (maps.flatten(2) for maps in pool_to_smaller(lower, upper))
    return lower @ upper.transpose(1, 2) / lower.shape[2]


@in_float32
def fsp_loss(
    student_lower: Tensor, student_upper: Tensor, teacher_lower: Tensor, teacher_upper: Tensor
) -> Tensor:
    """Return the mean squared difference of the FSP matrices of two networks (equation 2).

    The two lower maps have the same number of channels, and so have the two upper ones. Returns a
    scalar, float32.
    """
    return F.mse_loss(
        fsp_matrix(student_lower, student_upper), fsp_matrix(teacher_lower, teacher_upper)
    )


def levels(features: Features) -> tuple[Tensor, ...]:
    """Return the maps between which there is a flow: the stem's, and each stage's last."""
    return features.stem, *features.stages


class FSP(KD):
    """Learn the teacher's FSP matrices in a first phase, then the task."""

    def __init__(self, networks: Networks, *, flow: PhaseSettings, **shared: Any) -> None:
        super().__init__(networks, **shared)
        self.phase_settings = flow
        student, teacher = (
            [maps.shape[1] for maps in levels(features)] for features in networks.probe()
        )
        if student != teacher:
            raise UserError(
                "needs the same channels at the stem and at the end of each stage, and the teacher "
                f"has {teacher}, the student {student}; choose networks with the same channels, "
                "such as pair=resnet56-resnet20"
            )
        # A list is not registered: these modules of the student would be saved twice.
        self._body = modules_behind(self.student, networks.data, levels)

    def phases(self) -> Iterable[Phase]:
        """Yield the flow phase, which trains the student's body, then the main phase."""
        trained = nn.ModuleList(self._body)
        yield Phase(
            "flow",
            trains=trained,
            loss=self.flow_loss,
            weights={"fsp": 1.0},
            schedule=self.phase_settings,
        )
        yield from super().phases()

    def flow_loss(self, batch: Batch) -> LossOutput:
        """Return ``fsp``, the sum over adjacent levels."""
        with torch.no_grad():
            teacher = levels(self.teacher(batch.x))
        student = levels(self.student(batch.x))
        adjacent = zip(itertools.pairwise(student), itertools.pairwise(teacher), strict=True)
        losses = [fsp_loss(*of_student, *of_teacher) for of_student, of_teacher in adjacent]
        return LossOutput({"fsp": torch.stack(losses).sum()}, {})
