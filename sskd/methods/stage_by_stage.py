"""What methods share that compare two networks' maps at the end of every stage."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.methods.adapters import stage_shapes
from sskd.methods.kd import KD
from sskd.models import Features


class StageByStage(KD):
    """KD and a last term: ``stage_loss`` of the two maps [B, c, h, w], summed over the stages."""

    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(self, student: nn.Module, teacher: nn.Module, data: Images, **shared: Any) -> None:
        super().__init__(student, teacher, data, **shared)
        stage_shapes(student, teacher, data)  # refuses networks that do not match

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the last of ``terms``."""
        losses = map(self.stage_loss, student.stages, teacher.stages)
        return {self.terms[-1]: torch.stack(list(losses)).sum()}

    @staticmethod
    @abstractmethod
    def stage_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
        """Return one stage's loss, a scalar; the maps are [B, c, h, w]."""
