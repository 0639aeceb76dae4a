"""AB: Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
Neurons", AAAI 2019.

In a first phase the student learns on which side of its activation boundary (active or not) each
neuron of the teacher is. Then it trains on the labels and the teacher's logits alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods.adapters import conv_regressor
from sskd.methods.base import LossOutput, Phase, in_float32
from sskd.methods.kd import KD
from sskd.methods.networks import Networks, modules_behind
from sskd.schedule import PhaseSettings
from sskd.settings import Positive

# The CRD benchmark's factor, which makes a weight of the phase's loss unnecessary.
SCALE = 3 / 1000


@in_float32
def ab_loss(student_preact: Tensor, teacher_preact: Tensor, margin: float = 1) -> Tensor:
    """Return how far the student's neurons are from the teacher's side of the boundary.

    Equation 7, with the margin mu, the indicator rho(t) = 1 if t > 0 else 0, and sigma = ReLU, is
    ``rho(t) * sigma(mu - s)^2 + (1 - rho(t)) * sigma(mu + s)^2``. As one of the two factors is 0
    and the other 1, that is ``sigma(mu + side * s)^2`` with ``side`` = -1 if t > 0 else 1.

    Both pre-activations are [B, c, h, w]. Returns a scalar, float32: the sum over the neurons,
    averaged over the batch, times 3/1000. It is 0 if every neuron of the student is on the
    teacher's side by at least the margin.
    """
    side = torch.where(teacher_preact > 0, -1.0, 1.0)
    missing = (side * student_preact + margin).clamp(min=0)
    return SCALE * missing.square().sum() / len(student_preact)


class AB(KD):
    """Learn the teacher's activation boundaries in a first phase, then the task."""

    def __init__(
        self, networks: Networks, *, margin: Positive, boundary: PhaseSettings, **shared: Any
    ) -> None:
        super().__init__(networks, **shared)
        self.margin = margin
        self.phase_settings = boundary
        self.connectors = nn.ModuleList(
            nn.Identity() if student == teacher else conv_regressor(student, teacher)
            for student, teacher in networks.stage_shapes()
        )
        # A list is not registered: these modules of the student would be saved twice.
        self._body = modules_behind(self.student, networks.data, lambda output: output.preacts)

    def phases(self) -> Iterable[Phase]:
        """Yield the boundary phase, which trains the student's body, then the main phase."""
        trained = nn.ModuleList([*self._body, self.connectors])
        schedule = self.phase_settings
        yield Phase(
            "boundary",
            trains=trained,
            loss=self.boundary_loss,
            weights={"ab": 1.0},
            schedule=schedule,
        )
        yield from super().phases()

    def boundary_loss(self, batch: Batch) -> LossOutput:
        """Return ``ab``, the sum over the stages, each weighted half as much as the next."""
        with torch.no_grad():
            targets = self.teacher(batch.x).preacts
        preacts = self.student(batch.x).preacts
        stages = zip(self.connectors, preacts, targets, strict=True)
        losses = [ab_loss(connector(s), t, self.margin) for connector, s, t in stages]
        weighted = [2.0**-i * loss for i, loss in enumerate(reversed(losses))]
        return LossOutput({"ab": torch.stack(weighted).sum()}, {})
