"""Code shared by the methods that compare the maps at the end of every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sskd.methods.kd import KD, Outputs
from sskd.methods.networks import Networks


class StageByStage(KD):
    """KD for two networks with the same number of stages, whose maps a subclass compares."""

    teacher_outputs = (*KD.teacher_outputs, "stages")

    def __init__(self, networks: Networks, **shared: Any) -> None:
        super().__init__(networks, **shared)
        networks.stage_shapes()  # raises a UserError if the numbers of stages differ


def sum_over_stages(loss: Callable[[Tensor, Tensor], Tensor], outputs: Outputs) -> Tensor:
    """Return the sum of ``loss(student_map, teacher_map)`` over the stages, a scalar."""
    losses = map(loss, outputs.student.stages, outputs.teacher.stages)
    return torch.stack(list(losses)).sum()
