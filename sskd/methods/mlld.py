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
# The authors' code compares strong views at the first temperatures alone.
STRONG_TEMPERATURES = 3


def instance_loss(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return the sum of ``kd_loss`` over the ``temperatures``, a scalar.

    Both are logits [B, C].
    """
    return sum((kd_loss(student, teacher, t) for t in temperatures), student.new_zeros(()))


@in_float32
def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of the Gram matrices of the N rows, divided by N: a scalar.

    Both are [N, K]. The rows are an image's probabilities for the batch level, and a class's for
    the class level.
    """
    return (student @ student.T - teacher @ teacher.T).square().sum() / len(student)


@in_float32
def batch_loss(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return ``gram_loss`` of the images, summed over the ``temperatures``, a scalar.

    Both are logits [B, C].
    """
    pairs = (((student / t).softmax(1), (teacher / t).softmax(1)) for t in temperatures)
    return torch.stack([gram_loss(*pair) for pair in pairs]).sum()


@in_float32
def class_loss(student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Return ``gram_loss`` of the classes, summed over the ``temperatures``, a scalar.

    Both are logits [B, C].
    """
    pairs = (((student / t).softmax(1).T, (teacher / t).softmax(1).T) for t in temperatures)
    return torch.stack([gram_loss(*pair) for pair in pairs]).sum()


def code_terms(weak: View, strong: View, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the terms as the authors' code computes them.

    The instance level compares the strong views at the first three temperatures only; at the other
    temperatures it compares the weak views a second time. The other levels use the weak views only.
    """
    images, classes = low_confidence_shares(weak.teacher)
    first, others = temperatures[:STRONG_TEMPERATURES], temperatures[STRONG_TEMPERATURES:]
    weak_first, weak_others = _instance(weak, first), _instance(weak, others)
    strong_views = _instance(strong, first) + weak_others  # a quirk of the authors' code
    return {
        "instance": images * (weak_first + weak_others) + strong_views,
        "batch": images * batch_loss(weak.student, weak.teacher, temperatures),
        "classes": classes * class_loss(weak.student, weak.teacher, temperatures),
    }


def paper_terms(weak: View, strong: View, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Return the terms by the paper's equations: all levels and temperatures, and no masks.

    The paper has one view; the terms are the sums over both.
    """
    of_weak, of_strong = (_levels(view, temperatures) for view in (weak, strong))
    return {name: of_weak[name] + of_strong[name] for name in of_weak}


def _levels(view: View, temperatures: Sequence[float]) -> dict[str, Tensor]:
    return {
        "instance": _instance(view, temperatures),
        "batch": batch_loss(view.student, view.teacher, temperatures),
        "classes": class_loss(view.student, view.teacher, temperatures),
    }


def _instance(view: View, temperatures: Sequence[float]) -> Tensor:
    return instance_loss(view.compared_student, view.compared_teacher, temperatures)


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
        weak, strong = View(*self.whole(*weak)), View(*self.whole(*strong))
        return self.terms_of(weak, strong, self.temperatures)
