"""CC: Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

As in the CRD benchmark: neighbours in a batch stand for its pairs, and the congruence is that
of the differences between the networks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import probe_features
from sskd.methods.base import in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.settings import Width


@in_float32
def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the products of consecutive samples' absolute differences, summed over d.

    Both are embeddings [B, d]; the mean over the B - 1 neighbours, 0 for a single sample.
    A scalar, float32.
    """
    difference = (student - teacher).abs()
    products = difference[:-1] * difference[1:]
    return products.sum() / max(1, len(products))


class CC(KD):
    """Bring embeddings of both networks' pooled features together, in neighbouring samples."""

    terms = (*KD.terms, "cc")
    teacher_outputs = (*KD.teacher_outputs, "pooled")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        dimension: Width,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.student_embedding = nn.Linear(probe_features(student, data).pooled.shape[1], dimension)
        self.teacher_embedding = nn.Linear(probe_features(teacher, data).pooled.shape[1], dimension)
        self.adapters = (self.student_embedding, self.teacher_embedding)

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``cc``."""
        ours = self.student_embedding(student.pooled)
        theirs = self.teacher_embedding(teacher.pooled)
        return {"cc": cc_loss(ours, theirs)}
