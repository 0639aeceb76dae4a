"""PKT: Passalis & Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer",
ECCV 2018, section 3.
"""

from __future__ import annotations

from torch import Tensor

from sskd.data import Batch
from sskd.methods.base import in_float32, unit_vectors
from sskd.methods.kd import KD
from sskd.models import Features

EPS = 1e-7


def neighbours(features: Tensor) -> Tensor:
    """Return how likely each row of [B, d] picks each row, itself too: [B, B], rows sum to 1.

    In proportion to the cosine, scaled from [-1, 1] to [0, 1].
    """
    directions = unit_vectors(features)
    affinity = (directions @ directions.T + 1) / 2
    return affinity / affinity.sum(1, keepdim=True)


@in_float32
def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of the student's neighbours from the teacher's.

    ``p_t * log(p_t / p_s)``, averaged over all B^2 entries. ``student`` is [B, d], ``teacher``
    [B, e]. A scalar, float32, blind to a rotation of either space and to a row's length.
    """
    ours, theirs = neighbours(student) + EPS, neighbours(teacher)
    return (theirs * ((theirs + EPS) / ours).log()).mean()


class PKT(KD):
    """Give each sample of a batch the same likely neighbours, in the pooled feature."""

    terms = (*KD.terms, "pkt")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``pkt``."""
        return {"pkt": pkt_loss(student.pooled, teacher.pooled)}
