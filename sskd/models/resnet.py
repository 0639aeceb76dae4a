"""Residual networks for small images: He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, section 4.2.

A stage is the map after its last ReLU; its pre-activation is the sum in front of that ReLU.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import (
    Features,
    StagePlan,
    build_branch,
    initialise_convolutions,
    rectified_stage,
    run_rectified_stages,
)
from sskd.models.shortcut import shortcut


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; returns the sum, without the last ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        return residual + self.downsample(x)


class ResNet(nn.Module):
    """A network of ``depth = 6n + 2`` layers: a stem and three stages of ``n`` blocks.

    ``widths`` holds the channels of the stem and of the three stages.
    """

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int, *, depth: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.plan = (
            StagePlan(blocks, widths[0], widths[1], stride=1),
            StagePlan(blocks, widths[1], widths[2], stride=2),
            StagePlan(blocks, widths[2], widths[3], stride=2),
        )
        self.layer1, self.layer2, self.layer3 = map(_stage, self.plan)
        self.fc = nn.Linear(widths[3], num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with three stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        return run_rectified_stages((self.layer1, self.layer2, self.layer3), stem, self.fc)

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return build_branch(self.plan, stage, _stage)


_stage = partial(rectified_stage, block=BasicBlock)
