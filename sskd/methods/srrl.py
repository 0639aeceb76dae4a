"""SRRL: Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Softmax Regression
Representation Learning", ICLR 2021.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sskd.methods.adapters import BatchNorm
from sskd.methods.fitnet import hint_loss
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks, classifier_of


class SRRL(KD):
    """Match the teacher's pooled feature, and what the teacher's classifier makes of it."""

    terms = (*KD.terms, "feature", "regression")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def __init__(self, networks: Networks, **shared: Any) -> None:
        super().__init__(networks, **shared)
        student, teacher = (features.pooled.shape[1] for features in networks.probe())
        self.connector = nn.Sequential(
            nn.Conv2d(student, teacher, 1, bias=False), BatchNorm(teacher), nn.ReLU()
        )
        self.adapters = (self.connector,)
        # A tuple does not register it as a submodule, so checkpoints do not store it.
        self._classifier = (classifier_of(self.teacher, networks.data),)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``feature`` (L_FM of the paper) and ``regression`` (L_SR)."""
        connected = self.connector(outputs.student.pooled[:, :, None, None]).flatten(1)
        logits = self._classifier[0](connected)
        return {
            "feature": hint_loss(connected, outputs.teacher.pooled),
            "regression": hint_loss(logits, outputs.teacher.logits),
        }
