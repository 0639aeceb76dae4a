"""DIST: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher",
NeurIPS 2022, section 3.
"""

from __future__ import annotations

from torch import Tensor

from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD, Logits


@in_float32
def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 minus Pearson's correlation of each row, averaged: a scalar, float32.

    Both are [N, K]. A row without variance correlates with nothing: its loss is 1.
    """
    rows = (unit_vectors(each - each.mean(1, keepdim=True)) for each in (student, teacher))
    one, other = rows
    return 1 - (one * other).sum(1).mean()


class DIST(KD):
    """Correlate predictions: over the classes of an image, and over the images of a class."""

    terms = ("ce", "inter", "intra")

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``inter`` (equation 8) and ``intra`` (equation 9), times T^2."""
        student, teacher = (
            (each.float() / self.temperature).softmax(1)
            for each in self.whole(logits.student, logits.teacher)
        )
        inter = correlation_loss(student, teacher)
        intra = correlation_loss(student.T, teacher.T)
        return {"inter": self.temperature**2 * inter, "intra": self.temperature**2 * intra}
