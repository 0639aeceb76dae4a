"""TTM and WTTM: Zheng & Yang, "Knowledge Distillation Based on Transformed Teacher Matching",
ICLR 2024, sections 3 and 4.
"""

from __future__ import annotations

from torch import Tensor

from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Logits, softened_kl


def ttm_rows(logits: Logits, temperature: float) -> Tensor:
    """Return the divergence of the student's predictions from the transformed teacher's, [N].

    The transform raises the teacher's probabilities to the power 1/T and normalises them, which is
    its temperature T. The student has none.
    """
    return softened_kl(logits.student, logits.teacher.float() / temperature, 1)


@in_float32
def power_sum(teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the sum over the C classes of the teacher's probabilities to the power 1/T, [N].

    The smoother the teacher's prediction, the larger it is: from 1 to C^(1 - 1/T).
    """
    return (teacher_logits.log_softmax(1) / temperature).logsumexp(1).exp()


class TTM(KD):
    """KD with a temperature of the teacher alone."""

    terms = ("ce", "ttm")

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``ttm``."""
        return {"ttm": ttm_rows(logits, self.temperature).mean()}


class WTTM(TTM):
    """TTM that gives an image more weight the smoother the teacher's prediction is."""

    terms = ("ce", "wttm")

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return ``wttm``."""
        rows = ttm_rows(logits, self.temperature)
        return {"wttm": (power_sum(logits.teacher, self.temperature) * rows).mean()}
