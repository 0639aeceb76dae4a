"""KD: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.data import Batch
from sskd.methods.base import LossOutput, Method, in_float32, top1
from sskd.methods.logits import TRANSFORMS, LogitTransform
from sskd.methods.networks import Networks
from sskd.models import Features
from sskd.settings import Positive


class _SoftenedKL(torch.autograd.Function):
    """``T^2 * KL`` of rows and its gradient, accurate for any temperature T.

    At a temperature T the two predictions differ by about 1/T, and the divergence is a sum of
    terms of both signs that cancel to 1/T^2: from T = 1e4 on, float32 keeps none of its digits.
    With ``q - p = p * expm1(-d)``, whose sum over the classes is 0, each class adds
    ``p * (d + expm1(-d))``, which is not negative. Metal has no float64; there T = 1e4 is accurate
    to 1e-3.

    There is no second derivative: ``create_graph=True`` raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        exact = torch.float32 if student.device.type == "mps" else torch.float64
        log_q = F.log_softmax(student.to(exact) / temperature, dim=1)
        log_p = F.log_softmax(teacher.to(exact) / temperature, dim=1)
        p, d = log_p.exp(), log_p - log_q
        # If d is large, nothing cancels and expm1 may overflow.
        excess = torch.where(d.abs() < 1, p * torch.expm1(-d), log_q.exp() - p)
        ctx.save_for_backward((excess * temperature).to(student.dtype))
        rows = torch.addcmul(excess, p, d).sum(1).clamp(min=0)  # rounding can give -1e-33
        return (rows * temperature**2).to(student.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # once_differentiable would raise only if ``gradient`` itself needs a gradient. Compiled
        # code rejects a second derivative itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the KL divergence has no second derivative (create_graph=True)")
        (slope,) = ctx.saved_tensors
        return gradient[:, None] * slope, None, None


@in_float32
def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 * KL(softmax(teacher/T) || softmax(student/T))`` of each row.

    Args:
        student_logits: [N, C].
        teacher_logits: [N, C], without a gradient.
        temperature: T > 0, of both networks.

    Returns:
        [N], float32, not negative.
    """
    rows: Tensor = _SoftenedKL.apply(student_logits, teacher_logits.detach(), temperature)
    return rows


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return the mean over the batch of ``softened_kl``; both logits are [B, C]."""
    return softened_kl(student_logits, teacher_logits, temperature).mean()


class Logits(NamedTuple):
    """The logits of both networks, [N, C], as they are compared, and the ``labels`` [N]."""

    student: Tensor
    teacher: Tensor
    labels: Tensor


class Outputs(NamedTuple):
    """The features that both networks compute from one ``batch``."""

    student: Features
    teacher: Features
    batch: Batch


class Distillation(Method):
    """Learn the labels beside terms that compare the student with its teacher.

    A subclass computes these terms (``feature_terms``). ``KD`` adds those of the predictions.
    """

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` and the terms of ``teacher_terms``."""
        teacher = self.teacher_features(batch)
        student = self.student(batch.x)
        logits = student.logits.float()
        outputs = Outputs(student._replace(logits=logits), teacher, batch)
        terms = {"ce": F.cross_entropy(logits, batch.y), **self.teacher_terms(outputs)}
        return LossOutput(terms, {"top1": top1(logits, batch.y)})

    def teacher_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the terms that need the teacher: those of ``feature_terms``."""
        return self.feature_terms(outputs)

    @abstractmethod
    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the terms that compare features."""


class KD(Distillation):
    """Learn the teacher's softened predictions beside the labels.

    Most other methods are subclasses: they compare the predictions in another way
    (``logit_terms``), add terms (``feature_terms``) or a first phase (``phases``).
    ``weighting=crd_benchmark`` gives ``kd`` a weight of 0 in them. A subclass whose terms read more
    of the teacher than its logits declares that in ``teacher_outputs``.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "kd")
    teacher_outputs: ClassVar[tuple[str, ...]] = ("logits",)

    def __init__(
        self,
        networks: Networks,
        *,
        temperature: Positive,
        logits: LogitTransform = "raw",
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        self.temperature = temperature
        self.transform = TRANSFORMS[logits]

    def teacher_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the terms of ``logit_terms`` and ``feature_terms``."""
        student, teacher = (
            self.transform(features.logits) for features in (outputs.student, outputs.teacher)
        )
        logits = Logits(student, teacher, outputs.batch.y)
        return {**self.logit_terms(logits), **self.feature_terms(outputs)}

    def logit_terms(self, logits: Logits) -> dict[str, Tensor]:
        """Return the terms that compare the predictions: ``kd``."""
        return {"kd": kd_loss(logits.student, logits.teacher, self.temperature)}

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the terms that compare features: none here."""
        return {}
