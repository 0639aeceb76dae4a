"""FitNet: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, section 2.2.

The hint is given all along, beside the labels, as in the CRD benchmark, not in a phase of its
own before them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.errors import UserError
from sskd.methods.adapters import conv_regressor, probe_features
from sskd.methods.base import in_float32
from sskd.methods.kd import KD
from sskd.models import Features
from sskd.settings import Count


@in_float32
def hint_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Return the mean squared difference of two maps [B, c, h, w] (equation 3, but for its 1/2).

    ``student_map`` has been through the regressor. A scalar, float32.
    """
    return F.mse_loss(student_map, teacher_map)


class FitNet(KD):
    """Regress one stage's map of the teacher from the student's."""

    terms = (*KD.terms, "fitnet")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Images,
        *,
        stage: Count,
        **shared: Any,
    ) -> None:
        super().__init__(student, teacher, data, **shared)
        maps = [probe_features(network, data).stages for network in (student, teacher)]
        common = min(len(stages) for stages in maps)
        if stage > common:
            raise UserError(f"method.stage={stage}: choose 1 to {common}, which both networks have")
        shapes = [stages[stage - 1].shape[1:] for stages in maps]
        self.stage = stage
        self.regressor = nn.Sequential(conv_regressor(*shapes), nn.ReLU())
        self.adapters = (self.regressor,)

    def feature_terms(
        self, student: Features, teacher: Features, batch: Batch
    ) -> dict[str, Tensor]:
        """Return ``fitnet``."""
        hint, guided = teacher.stages[self.stage - 1], student.stages[self.stage - 1]
        return {"fitnet": hint_loss(self.regressor(guided), hint)}
