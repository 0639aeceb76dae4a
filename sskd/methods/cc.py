"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

In the form of the CRD benchmark: consecutive samples of a batch replace all pairs, and the products
are those of the differences between the networks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.settings import Width


@in_float32
def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the product of the absolute differences of consecutive samples, summed over d.

    Both embeddings are [B, d]. Returns the mean over the B - 1 consecutive pairs, a scalar,
    float32; 0 for a single sample.
    """
    difference = (student - teacher).abs()
    products = difference[:-1] * difference[1:]
    return products.sum() / max(1, len(products))


class CC(KD):
    """Compare embeddings of both networks' pooled features, in consecutive samples."""

    terms = (*KD.terms, "cc")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def __init__(self, networks: Networks, *, dimension: Width, **shared: Any) -> None:
        super().__init__(networks, **shared)
        student, teacher = networks.probe()
        self.student_embedding = nn.Linear(student.pooled.shape[1], dimension)
        self.teacher_embedding = nn.Linear(teacher.pooled.shape[1], dimension)
        self.adapters = (self.student_embedding, self.teacher_embedding)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``cc``."""
        student = self.student_embedding(outputs.student.pooled)
        teacher = self.teacher_embedding(outputs.teacher.pooled)
        return {"cc": cc_loss(*self.whole(student, teacher))}
