"""The teacher of HSAKD*: Yang, An, Cai, Xu, "Hierarchical Self-supervised Augmented Knowledge
Distillation", IJCAI 2021.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from sskd.data import Batch
from sskd.methods.auxiliary import (
    ROTATIONS,
    VIEWS,
    AuxiliaryClassifiers,
    joint_loss,
    joint_top1,
)
from sskd.methods.base import LossOutput, Method, top1
from sskd.methods.networks import Networks


class HSAKDTeacher(Method):
    """A network alone, trained together with its auxiliary classifiers: the teacher of HSAKD*."""

    needs_teacher = False
    has_heads = True
    views = VIEWS
    terms = ("ce", "joint")

    def __init__(self, networks: Networks, *, nesterov: bool, **shared: Any) -> None:
        super().__init__(networks, **shared)
        self.optimizer_settings = {"nesterov": nesterov}
        self.classifiers = AuxiliaryClassifiers(self.student, networks)
        self.adapters = (self.classifiers,)

    @property
    def heads(self) -> nn.Module:
        """The auxiliary classifiers, which ``hsakd`` uses."""
        return self.classifiers

    def loss(self, batch: Batch) -> LossOutput:
        """Return ``ce`` of the views that are not rotated, and ``joint`` of all views."""
        features = self.student(batch.x)
        logits = features.logits[::ROTATIONS].float()
        joint = self.classifiers(features.stages)
        return LossOutput(
            {"ce": F.cross_entropy(logits, batch.y), "joint": joint_loss(joint, batch.y)},
            {"top1": top1(logits, batch.y), "joint_top1": joint_top1(joint, batch.y)},
        )
