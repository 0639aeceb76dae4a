"""ResNet-50 for small images: He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, table 1, with a 3x3 stem of stride 1 and no max-pool, as in both published code
bases for CIFAR-100.

A stage is the map after its last ReLU; its pre-activation is the sum in front of that ReLU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import (
    Features,
    RectifiedStage,
    StagePlan,
    build_branch,
    initialise_convolutions,
    pool_and_classify,
    run_rectified_stage,
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

    The 3x3 convolution has the stride; the output has ``4 * channels`` channels.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = F.relu(self.bn2(self.conv2(residual)), inplace=True)
        residual = self.bn3(self.conv3(residual))
        return residual + self.shortcut(x)


class ResNet50(nn.Module):
    """A stem of 64 channels and four stages of 3, 4, 6 and 3 bottlenecks."""

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
        stage1, preact1 = run_rectified_stage(self.layer1, stem)
        stage2, preact2 = run_rectified_stage(self.layer2, stage1)
        stage3, preact3 = run_rectified_stage(self.layer3, stage2)
        stage4, preact4 = run_rectified_stage(self.layer4, stage3)
        return pool_and_classify(
            stage4,
            self.linear,
            stem=stem,
            stages=(stage1, stage2, stage3, stage4),
            preacts=(preact1, preact2, preact3, preact4),
        )

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return build_branch(PLAN, stage, _stage)


def _stage(plan: StagePlan) -> RectifiedStage:
    channels = plan.out_channels // EXPANSION
    first = Bottleneck(plan.in_channels, channels, plan.stride)
    others = (Bottleneck(plan.out_channels, channels, stride=1) for _ in range(plan.blocks - 1))
    return RectifiedStage(first, *others)
