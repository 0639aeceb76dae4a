"""ResNet-50 for small images: He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, table 1, with a 3x3 stem of stride 1 and no max-pool, as in both published code
bases for CIFAR-100.

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

EXPANSION = 4
PLAN = (
    StagePlan(3, 64, 256, stride=1),
    StagePlan(4, 256, 512, stride=2),
    StagePlan(6, 512, 1024, stride=2),
    StagePlan(3, 1024, 2048, stride=2),
)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; returns the sum, without the last ReLU.

    The 3x3 convolution has the stride; it and the first one have a quarter of ``out_channels``.
    ``shortcut_name`` is the name of the shortcut in checkpoints.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, shortcut_name: str = "shortcut"
    ) -> None:
        super().__init__()
        channels = out_channels // EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut_name = shortcut_name
        self.add_module(shortcut_name, shortcut(in_channels, out_channels, stride))

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return residual + self.get_submodule(self.shortcut_name)(x)


class ResNet50(nn.Module):
    """A stem of 64 channels and four stages of 3, 4, 6 and 3 bottlenecks."""

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(_stage, PLAN)
        self.linear = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return run_rectified_stages(stages, stem, self.linear)

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return build_branch(PLAN, stage, _stage)


_stage = partial(rectified_stage, block=Bottleneck)
