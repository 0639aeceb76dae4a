"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.base import Method, Step, in_float32, top1
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
    """Imitate the teacher's softened predictions beside the labels."""

    terms = ("ce", "kd")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        weights: Mapping[str, float],
        temperature: Positive,
    ) -> None:
        super().__init__(student, teacher, data, weights=weights)
        self.temperature = temperature

    def loss(self, batch: Batch) -> Step:
        """Return ``ce`` and ``kd``."""
        with torch.no_grad():
            teacher_logits = self.teacher(batch.x).logits
        logits = self.student(batch.x).logits.float()
        terms = {
            "ce": F.cross_entropy(logits, batch.y),
            "kd": kd_loss(logits, teacher_logits, self.temperature),
        }
        return Step(terms, {"top1": top1(logits, batch.y)})
