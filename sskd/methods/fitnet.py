"""FitNet: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, section 2.2.

The student learns the hint during the whole run, beside the labels, as in the CRD benchmark. In the
paper it learns the hint in a first phase.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.methods.adapters import conv_regressor
from sskd.methods.base import in_float32
from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks
from sskd.settings import Count


@in_float32
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of two maps or features of one shape, a scalar, float32.

    Equation 3 has a factor of 1/2 and sums over the entries; this has no factor and averages, as
    in the CRD benchmark. ``student`` is the output of the regressor.
    """
    return F.mse_loss(student, teacher)


class FitNet(KD):
    """Regress the teacher's map at the end of one stage, the hint, from the student's."""

    terms = (*KD.terms, "fitnet")
    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(self, networks: Networks, *, stage: Count, **shared: Any) -> None:
        super().__init__(networks, **shared)
        maps = [features.stages for features in networks.probe()]
        common = min(len(stages) for stages in maps)
        if stage > common:
            raise UserError(f"method.stage={stage}: choose 1 to {common}, which both networks have")
        shapes = [stages[stage - 1].shape[1:] for stages in maps]
        self.stage = stage
        self.regressor = nn.Sequential(conv_regressor(*shapes), nn.ReLU())
        self.adapters = (self.regressor,)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``fitnet``."""
        guided = outputs.student.stages[self.stage - 1]
        hint = outputs.teacher.stages[self.stage - 1]
        return {"fitnet": hint_loss(self.regressor(guided), hint)}
