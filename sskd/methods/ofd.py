"""OFD: Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation",
ICCV 2019.

The student learns the teacher's pre-activations. If the teacher's is negative, its ReLU removes the
value, so it is enough if the student's is lower.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.methods.adapters import BatchNorm, pool_to_smaller
from sskd.methods.base import in_float32
from sskd.methods.kd import Distillation, Outputs
from sskd.methods.networks import Networks, last_layers

# The authors' factor, which makes a weight of the loss unnecessary.
SCALE = 1 / 1000
# If the share of a channel's negative values is lower, its margin is -3 standard deviations.
SMALLEST_SHARE = 0.001


def negative_means(layer: nn.BatchNorm2d) -> Tensor:
    """Return the mean of the negative outputs of ``layer`` in each channel, [c], at most 0.

    These are the margins of the paper's margin ReLU. The outputs of a channel are taken to be
    normally distributed, with the layer's bias as mean and its weight as standard deviation.
    """
    mean, deviation = layer.bias.detach().cpu().double(), layer.weight.detach().cpu().double().abs()
    ratio = mean / deviation
    share = torch.special.ndtr(-ratio)
    density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    margins = torch.where(
        share > SMALLEST_SHARE, mean - deviation * density / share, -3 * deviation
    )
    return margins.float()


@in_float32
def ofd_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Return the partial L2 distance of two pre-activations, a scalar, float32.

    The target is the teacher's pre-activation, or the margin if that is larger. An entry whose
    target is not positive costs nothing if the student's is not larger than it.

    Args:
        student: [B, c, h, w].
        teacher: [B, c, h, w].
        margin: [c], at most 0.

    Returns:
        The sum of the squared differences, averaged over the batch, times 1/1000.
    """
    target = torch.maximum(teacher, margin[:, None, None])
    counts = (student > target) | (target > 0)
    return SCALE * torch.where(counts, (student - target).square(), 0).sum() / len(student)


class Connector(nn.Module):
    """Map the student's pre-activation of one stage to the teacher's channels, and compare them."""

    margin: Tensor

    def __init__(self, channels: int, margin: Tensor) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, len(margin), 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        self.map = nn.Sequential(convolution, BatchNorm(len(margin)))
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of two maps [B, c, h, w]; the larger is pooled to the smaller."""
        student, teacher = pool_to_smaller(student, teacher)
        return ofd_loss(self.map(student), teacher, self.margin)


class OFD(Distillation):
    """Learn what the teacher's last ReLU of every stage lets through."""

    terms = ("ce", "ofd")
    teacher_outputs = ("preacts",)

    def __init__(self, networks: Networks, **shared: Any) -> None:
        super().__init__(networks, **shared)
        assert networks.teacher is not None
        layers = last_layers(networks.teacher, networks.data, lambda output: output.preacts)
        connectors = []
        for layer, (student, teacher) in zip(layers, networks.stage_shapes(), strict=True):
            if not isinstance(layer, nn.BatchNorm2d) or layer.num_features != teacher[0]:
                raise UserError(
                    "needs a BatchNorm of all channels in front of the last ReLU of each stage of "
                    f"the teacher, but {type(networks.teacher).__name__} lacks one; choose "
                    "networks with another teacher"
                )
            connectors.append(Connector(student[0], negative_means(layer)))
        self.connectors = nn.ModuleList(connectors)
        self.adapters = (self.connectors,)

    def feature_terms(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return ``ofd``, the sum over the stages, each weighted half as much as the next."""
        preacts = outputs.student.preacts, outputs.teacher.preacts
        stages = zip(self.connectors, *preacts, strict=True)
        losses = [connector(student, teacher) for connector, student, teacher in stages]
        weighted = [2.0**-i * loss for i, loss in enumerate(reversed(losses))]
        return {"ofd": torch.stack(weighted).sum()}
