"""CRLD: Zhang, Liu, Cai, Ma, "Cross-View Consistency Regularisation for Knowledge Distillation",
ACM MM 2024.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sskd.methods.kd import softened_kl
from sskd.methods.networks import Networks
from sskd.methods.two_views import TwoViews, View
from sskd.settings import Positive, Share


def confident(teacher: Tensor, threshold: float) -> Tensor:
    """Return which images have a confidence of at least ``threshold``: bool [B].

    ``teacher`` is logits [B, C].
    """
    return teacher.float().softmax(1).amax(1) >= threshold


class CRLD(TwoViews):
    """Learn the teacher's predictions within and across a weak and a strong view.

    ``within`` is the authors' within-view loss and ``across`` their cross-view loss. Each is a mean
    over the batch, to which an image adds 0 if the teacher is not confident: about the weak view
    for ``within``, about the strong view for ``across``.
    """

    terms = ("ce", "within", "across")

    def __init__(
        self,
        networks: Networks,
        *,
        temperature: Positive,
        tau_w: Share,
        tau_s: Share,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.temperature = temperature
        self.tau_w = tau_w
        self.tau_s = tau_s

    def view_terms(self, weak: View, strong: View) -> dict[str, Tensor]:
        """Return ``within`` and ``across``."""
        within = self._divergence(weak, weak) + self._divergence(strong, strong)
        across = self._divergence(strong, weak) + self._divergence(weak, strong)
        return {
            "within": (within * confident(weak.teacher, self.tau_w)).mean(),
            "across": (across * confident(strong.teacher, self.tau_s)).mean(),
        }

    def _divergence(self, of_student: View, of_teacher: View) -> Tensor:
        student, teacher = of_student.compared_student, of_teacher.compared_teacher
        return softened_kl(student, teacher, self.temperature)
