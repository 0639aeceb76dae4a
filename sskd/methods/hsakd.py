"""HSAKD: Yang, An, Cai, Xu, "Hierarchical Self-supervised Augmented Knowledge Distillation",
IJCAI 2021.

Each image comes in four rotations. Behind each stage of both networks an auxiliary classifier
predicts the class and the rotation at once. The student learns the joint predictions of the
teacher's classifiers, stage by stage, and the teacher's predictions for all rotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.data import Batch
from sskd.methods.auxiliary import (
    ROTATIONS,
    VIEWS,
    AuxiliaryClassifiers,
    joint_loss,
    joint_top1,
)
from sskd.methods.base import LossOutput, Method, Phase, top1
from sskd.methods.kd import kd_loss
from sskd.methods.networks import Networks
from sskd.schedule import PhaseSettings
from sskd.settings import Positive


def hierarchical_kl(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float
) -> Tensor:
    """Return the sum over the stages of ``kd_loss`` (L_kl_q of the paper), a scalar.

    Args:
        student: the joint logits of each auxiliary classifier, [N, 4 * classes].
        teacher: the same, of as many stages.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([kd_loss(own, other, temperature) for own, other in pairs]).sum()


class HSAKD(Method):
    """Learn the joint predictions behind each stage, and the predictions for all rotations.

    Of the paper's losses, ``kl_q`` is that of the auxiliary classifiers and ``kl_p`` that of the
    networks' own predictions.
    """

    views = VIEWS
    terms = ("ce", "kl_q", "kl_p")
    teacher_outputs = ("logits", "stages")
    uses_heads = True

    def __init__(
        self,
        networks: Networks,
        *,
        temperature: Positive,
        nesterov: bool,
        teacher_classifiers: PhaseSettings,
        **shared: Any,
    ) -> None:
        super().__init__(networks, **shared)
        networks.stage_shapes()  # raises a UserError if the numbers of stages differ
        self.temperature = temperature
        self.optimizer_settings = {"nesterov": nesterov}
        self.phase_settings = teacher_classifiers
        # The teacher's come first: their initial weights must not depend on the student.
        self.teacher_classifiers = AuxiliaryClassifiers(self.teacher, networks)
        self._classifiers_are_trained = networks.heads is not None
        if networks.heads is not None:
            self.teacher_classifiers.load(networks.heads)
        self.student_classifiers = AuxiliaryClassifiers(self.student, networks)
        self.adapters = (self.student_classifiers,)

    def phases(self) -> Iterable[Phase]:
        """Yield the phase of the teacher's classifiers, which students share, then the main one.

        A teacher that was trained with its classifiers (HSAKD*) needs no first phase.
        """
        if not self._classifiers_are_trained:
            yield Phase(
                "teacher_classifiers",
                trains=self.teacher_classifiers,
                loss=self.classifiers_loss,
                weights={"joint": 1.0},
                views=self.views,
                schedule=self.phase_settings,
                teacher_only=True,
                optimizer=self.optimizer_settings,
            )
        yield from super().phases()

    def classifiers_loss(self, batch: Batch) -> LossOutput:
        """Return ``joint`` of the teacher's auxiliary classifiers."""
        joint = self.teacher_classifiers(self.teacher_features(batch).stages)
        metrics = {"joint_top1": joint_top1(joint, batch.y)}
        return LossOutput({"joint": joint_loss(joint, batch.y)}, metrics)

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` of the views that are not rotated, ``kl_q`` and ``kl_p`` of all views."""
        teacher = self.teacher_features(batch)
        with torch.no_grad():
            targets = self.teacher_classifiers(teacher.stages)
        student = self.student(batch.x)
        joint = self.student_classifiers(student.stages)
        normal = student.logits[::ROTATIONS].float()
        terms = {
            "ce": F.cross_entropy(normal, batch.y),
            "kl_q": hierarchical_kl(joint, targets, self.temperature),
            "kl_p": kd_loss(student.logits, teacher.logits, self.temperature),
        }
        return LossOutput(terms, {"top1": top1(normal, batch.y)})
