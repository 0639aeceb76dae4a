"""FSP: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning", CVPR 2017, section 3.

In a first phase the student learns the flow of the teacher: how the channels of one level go
together with those of the next. Then it trains on the labels (and the teacher's logits) alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods.adapters import modules_behind, pool_to_smaller, probe_features
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.schedule import PhaseSettings


def fsp_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the mean products of the channels of two levels (equation 1).

    [B, c, h, w] and [B, k, H, W] to [B, c, k]; the larger is average-pooled to the smaller.
    """
    lower, upper = (maps.flatten(2) for maps in pool_to_smaller(lower, upper))
    return lower @ upper.transpose(1, 2) / lower.shape[2]


@in_float32
def fsp_loss(
    student_lower: Tensor, student_upper: Tensor, teacher_lower: Tensor, teacher_upper: Tensor
) -> Tensor:
    """Return the mean squared difference of two networks' flow between two levels (equation 2).

    Both networks' lower maps have the same channels, and both upper ones. A scalar, float32.
    """
    return F.mse_loss(
        fsp_matrix(student_lower, student_upper), fsp_matrix(teacher_lower, teacher_upper)
    )


def levels(features: Features) -> tuple[Tensor, ...]:
    """Return the maps between which there is a flow: the stem, and the end of each stage."""
    return features.stem, *features.stages


class FSP(KD):
    """Learn the teacher's flow first, then the task."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        flow: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.phase = flow
        ours, theirs = (
            [maps.shape[1] for maps in levels(probe_features(network, data))]
            for network in (student, teacher)
        )
        if ours != theirs:
            raise UserError(
                "needs the same channels at the stem and at the end of each stage, and the teacher "
                f"has {theirs}, the student {ours}; choose networks that agree, such as "
                "pair=resnet56-resnet20"
            )
        # Not registered: these parts of the student would be in the checkpoint twice.
        self._body = modules_behind(student, data, levels)

    def phases(self) -> Iterable[Phase]:
        """Yield the flow phase, for the student's body, then the student's training."""
        trained = nn.ModuleList(self._body)
        yield Phase("flow", trained, self.flow_loss, {"fsp": 1.0}, schedule=self.phase)
        yield from super().phases()

    def flow_loss(self, batch: Batch) -> LossOutput:
        """Return ``fsp``, the sum over adjacent levels."""
        with torch.no_grad():
            teacher = levels(self.teacher(batch.x))
        student = levels(self.student(batch.x))
        adjacent = zip(itertools.pairwise(student), itertools.pairwise(teacher), strict=True)
        losses = [fsp_loss(*ours, *theirs) for ours, theirs in adjacent]
        return LossOutput({"fsp": torch.stack(losses).sum()}, {})
