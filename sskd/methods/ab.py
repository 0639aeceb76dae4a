"""AB: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
Neurons", AAAI 2019.

In a first phase the student learns on which side of its ReLU each of the teacher's neurons
lies; then it trains on the labels (and the teacher's logits) alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import conv_regressor, modules_behind, stage_shapes
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD
from sskd.schedule import PhaseSettings
from sskd.settings import Positive

# The CRD benchmark's factor; with it the phase's loss needs no weight of its own.
SCALE = 3 / 1000


@in_float32
def ab_loss(student_preact: Tensor, teacher_preact: Tensor, margin: float = 1) -> Tensor:
    """Return how far the student's neurons are from the teacher's side, with a margin.

    ``(s + margin)^2`` where the teacher is not active (t <= 0) and s > -margin,
    ``(s - margin)^2`` where it is and s <= margin (equation 7), summed over the neurons,
    averaged over the batch, times 3/1000.

    Both are pre-activations [B, c, h, w]. A scalar, float32, 0 where all signs agree beyond
    the margin.
    """
    side = torch.where(teacher_preact > 0, -1.0, 1.0)
    missing = (side * student_preact + margin).clamp(min=0)
    return SCALE * missing.square().sum() / len(student_preact)


class AB(KD):
    """Learn the teacher's activation boundaries first, then the task."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        margin: Positive,
        boundary: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.margin = margin
        self.phase = boundary
        self.connectors = nn.ModuleList(
            nn.Identity() if ours == theirs else conv_regressor(ours, theirs)
            for ours, theirs in stage_shapes(student, teacher, data)
        )
        # Not registered: these parts of the student would be in the checkpoint twice.
        self._body = modules_behind(student, data, lambda features: features.preacts)

    def phases(self) -> Iterable[Phase]:
        """Yield the boundary phase, for the student's body, then the student's training."""
        trained = nn.ModuleList([*self._body, self.connectors])
        yield Phase("boundary", trained, self.boundary_loss, {"ab": 1.0}, schedule=self.phase)
        yield from super().phases()

    def boundary_loss(self, batch: Batch) -> LossOutput:
        """Return ``ab``, the sum over the stages, each weighted half as much as the next."""
        with torch.no_grad():
            targets = self.teacher(batch.x).preacts
        preacts = self.student(batch.x).preacts
        pairs = zip(self.connectors, preacts, targets, strict=True)
        losses = [ab_loss(adapt(ours), theirs, self.margin) for adapt, ours, theirs in pairs]
        weighted = [2.0**-i * loss for i, loss in enumerate(reversed(losses))]
        return LossOutput({"ab": torch.stack(weighted).sum()}, {})
