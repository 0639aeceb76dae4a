"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.base import Method, Step, in_float32, top1
from sskd.models import Features
from sskd.settings import Positive


@in_float32
def divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 * KL(softmax(teacher/T) || softmax(student/T))`` of each row.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C], no gradient flows into it.
        temperature: T > 0, of both.

    Returns:
        [N], float32, each >= 0.
    """
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    per_class = F.kl_div(student, teacher, reduction="none", log_target=True)
    return per_class.sum(1) * temperature**2


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the mean over the batch of ``divergence``; both logits are [B, C]."""
    return divergence(student_logits, teacher_logits, temperature).mean()


class KD(Method):
    """Imitate the teacher's softened predictions beside the labels.

    Most other methods are subclasses: they add terms (``feature_terms``) or a first phase
    (``stages``); with ``weighting=crd_benchmark`` they stand alone. One whose terms read more of
    the teacher than its logits says so in ``teacher_outputs``.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")
    teacher_outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        temperature: Positive,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        self.temperature = temperature

    def loss(self, batch: Batch) -> Step:
        """Return ``ce``, ``kd`` and the terms of ``feature_terms``."""
        teacher = self.ask_teacher(batch)
        student = self.student(batch.x)
        logits = student.logits.float()
        terms = {
            "ce": F.cross_entropy(logits, batch.y),
            "kd": kd_loss(logits, teacher.logits, self.temperature),
            **self.feature_terms(student, teacher, batch),
        }
        return Step(terms, {"top1": top1(logits, batch.y)})

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the terms beside ``ce`` and ``kd``: none here."""
        return {}
