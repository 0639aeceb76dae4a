"""MLLD, also MLKD: Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023, section 3.

``variant`` chooses the authors' code, which the published accuracies come from, or the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sskd.methods.base import in_float32
from sskd.methods.kd import kd_loss
from sskd.methods.low_confidence import low_confidence_shares
from sskd.methods.networks import Networks
from sskd.methods.two_views import TwoViews, View
from sskd.schedule import PhaseSettings
from sskd.settings import Positive

Variant = Literal["code", "paper"]
Temperatures = Annotated[list[Positive], Field(min_length=1, max_length=30)]
_STRONG = 3  # the first temperatures, at which the authors' code compares strong views


def instance_loss(view: View, temperatures: Sequence[float]) -> Tensor:
    """Return the sum of ``kd_loss`` over the ``temperatures``, a scalar."""
    student, teacher = view.compared_student, view.compared_teacher
    return sum((kd_loss(student, teacher, t) for t in temperatures), student.new_zeros(()))


@in_float32
def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the Gram matrices of the N rows, divided by N: a scalar.

    Both are [N, K]. The rows are an image's probabilities for the batch level, and a class's for
    the class level.
    """
    return (student @ student.T - teacher @ teacher.T).square().sum() / len(student)


def batch_loss(view: View, temperatures: Sequence[float]) -> Tensor:
    """Return ``gram_loss`` of the images, [B, B], summed over the ``temperatures``."""
    pairs = (_softened(view, t) for t in temperatures)
    return torch.stack([gram_loss(student, teacher) for student, teacher in pairs]).sum()


def class_loss(view: View, temperatures: Sequence[float]) -> Tensor:
    """Return ``gram_loss`` of the classes, [C, C], summed over the ``temperatures``."""
    pairs = (_softened(view, t) for t in temperatures)
    return torch.stack([gram_loss(student.T, teacher.T) for student, teacher in pairs]).sum()


def _softened(view: View, temperature: float) -> tuple[Tensor, Tensor]:
    return (view.student / temperature).softmax(1), (view.teacher / temperature).softmax(1)


def code_terms(weak: View, strong: View, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the terms as the authors' code computes them.

    Of the strong views, the instance level has the first three temperatures, and at the others it
    has the weak views once more; the other levels do not enter the loss.
    """
    images, classes = low_confidence_shares(weak.teacher)
    first, others = temperatures[:_STRONG], temperatures[_STRONG:]
    of_first, of_others = instance_loss(weak, first), instance_loss(weak, others)
    again = instance_loss(strong, first) + of_others
    return {
        "instance": images * (of_first + of_others) + again,
        "batch": images * batch_loss(weak, temperatures),
        "classes": classes * class_loss(weak, temperatures),
    }


def paper_terms(weak: View, strong: View, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the terms by the paper's equations: all levels and temperatures, and no masks.

    The paper has one view; the terms are the sums over both.
    """
    levels = {"instance": instance_loss, "batch": batch_loss, "classes": class_loss}
    return {
        name: level(weak, temperatures) + level(strong, temperatures)
        for name, level in levels.items()
    }


VARIANTS: dict[str, Callable[[View, View, Sequence[float]], dict[str, Tensor]]] = {
    "code": code_terms,
    "paper": paper_terms,
}


class MLLD(TwoViews):
    """Align predictions of images, correlations of images and correlations of classes.

    ``logits`` (LS) changes the instance level, as in the authors' code of LS.
    """

    terms = ("ce", "instance", "batch", "classes")

    def __init__(
        self,
        networks: Networks,
        *,
        temperatures: Temperatures,
        variant: Variant,
        distill: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.temperatures = temperatures
        self.terms_of = VARIANTS[variant]
        self.schedule = distill

    def view_terms(self, weak: View, strong: View) -> dict[str, Tensor]:
        """Return ``instance``, ``batch`` and ``classes``, the three levels of the paper."""
        return self.terms_of(weak, strong, self.temperatures)
