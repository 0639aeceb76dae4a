"""PKT: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
ECCV 2018, section 3.
"""

from __future__ import annotations

from torch import Tensor

from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD, Outputs

EPS = 1e-7


def conditional_probabilities(features: Tensor) -> Tensor:
    """Return ``p(j|i)``, the probability that sample i of [B, d] selects sample j as neighbour.

    Row i of [B, B] holds ``p(.|i)`` and sums to 1. It is proportional to the cosine kernel,
    ``(cos + 1) / 2``. As in the authors' code, a sample may select itself.
    """
    directions = unit_vectors(features)
    kernel = (directions @ directions.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


@in_float32
def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of the student's conditional probabilities from the teacher's.

    ``p_teacher * log(p_teacher / p_student)``, averaged over all B^2 entries. ``student`` is
    [B, d], ``teacher`` [B, e]. Returns a scalar, float32, which does not change if either network's
    features are rotated, or if one sample's feature is multiplied by a positive factor.
    """
    p_student, p_teacher = map(conditional_probabilities, (student, teacher))
    return (p_teacher * ((p_teacher + EPS) / (p_student + EPS)).log()).mean()


class PKT(KD):
    """Compare the probabilities that samples of a batch are neighbours, in the pooled feature."""

    terms = (*KD.terms, "pkt")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``pkt``."""
        return {"pkt": pkt_loss(*self.whole(outputs.student.pooled, outputs.teacher.pooled))}
