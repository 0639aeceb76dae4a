"""ShuffleNet with three groups: Zhang et al., "ShuffleNet: An Extremely Efficient
Convolutional Neural Network for Mobile Devices", CVPR 2018, with a 1x1 stem of stride 1.

A stage is the map after its last ReLU. Its pre-activation is the input of that ReLU: a sum, or
in a block of stride 2 a concatenation. PyTorch's default initialisation is used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import (
    Features,
    RectifiedStage,
    StagePlan,
    build_branch,
    run_rectified_stages,
)

GROUPS = 3
STEM_CHANNELS = 24
PLAN = (
    StagePlan(4, STEM_CHANNELS, 240, stride=2),
    StagePlan(8, 240, 480, stride=2),
    StagePlan(4, 480, 960, stride=2),
)


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1, without the last ReLU.

    With stride 1 the input is added. With stride 2 the pooled input is concatenated, so the
    convolutions produce ``out_channels - in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.downsamples = stride == 2
        self.groups = groups
        produced = out_channels - in_channels if self.downsamples else out_channels
        middle = produced // 4
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, produced, 1, groups=GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(produced)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(shuffle_channels(out, self.groups)))
        out = F.relu(out, inplace=True)
        out = self.bn3(self.conv3(out))
        if self.downsamples:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return out + x


class ShuffleNetV1(nn.Module):
    """A stem and three stages of 4, 8 and 4 blocks with 240, 480 and 960 channels."""

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1, self.layer2, self.layer3 = map(_stage, PLAN)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with three stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        return run_rectified_stages((self.layer1, self.layer2, self.layer3), stem, self.linear)

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map.

        Their convolutions are initialised like those of the other families, as in HSAKD's code.
        """
        return build_branch(PLAN, stage, _stage)


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of ``groups`` equal groups of ``x``, ``[B, c, h, w]``."""
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(x.shape)


def _stage(plan: StagePlan) -> RectifiedStage:
    # The stem has too few channels for a grouped convolution (section 3.2 of the paper).
    groups = 1 if plan.in_channels == STEM_CHANNELS else GROUPS
    first = ShuffleBlock(plan.in_channels, plan.out_channels, plan.stride, groups)
    width = plan.out_channels
    others = (ShuffleBlock(width, width, 1, GROUPS) for _ in range(plan.blocks - 1))
    return RectifiedStage(first, *others)
