"""ShuffleNet V2 at width 1: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design", ECCV 2018, with a 1x1 stem of stride 1 and no max-pool.

A stage is the map after the shuffle of its last block. Its pre-activation is the input of that
block's ReLU, both halves concatenated, before the shuffle. PyTorch's default initialisation is
used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import Features, StagePlan, pool_and_classify, stages_behind
from sskd.models.shufflenet_v1 import shuffle_channels

STEM_CHANNELS = 24
LAST_CHANNELS = 1024
PLAN = (
    StagePlan(4, STEM_CHANNELS, 116, stride=2),
    StagePlan(8, 116, 232, stride=2),
    StagePlan(4, 232, 464, stride=2),
)


class SplitBlock(nn.Module):
    """Convolutions on the second half of the channels; returns before ReLU and shuffle.

    The first half passes through. It is already the output of a ReLU, so the ReLU after the
    concatenation does not change it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        return torch.cat([passed, out], dim=1)


class DownBlock(nn.Module):
    """Two branches with a stride, each half of the output; returns before ReLU and shuffle."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = _depthwise(in_channels, stride)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half, stride)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn5(self.conv5(self.bn4(self.conv4(right))))
        return torch.cat([left, right], dim=1)


class ShuffleNetV2(nn.Module):
    """A stem, three stages of 4, 8 and 4 blocks and a 1x1 convolution."""

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1, self.layer2, self.layer3 = map(_stage, PLAN)
        self.conv2 = nn.Conv2d(464, LAST_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with three stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        stage1, preact1 = _run_stage(self.layer1, stem)
        stage2, preact2 = _run_stage(self.layer2, stage1)
        stage3, preact3 = _run_stage(self.layer3, stage2)
        last_map = F.relu(self.bn2(self.conv2(stage3)))
        return pool_and_classify(
            last_map,
            self.linear,
            stem=stem,
            stages=(stage1, stage2, stage3),
            preacts=(preact1, preact2, preact3),
        )

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        channels = PLAN[-1].out_channels
        convolution = nn.Conv2d(channels, LAST_CHANNELS, 1, bias=False)
        stages = map(_stage, stages_behind(PLAN, stage))
        return nn.Sequential(*stages, convolution, nn.BatchNorm2d(LAST_CHANNELS), nn.ReLU())


def _depthwise(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class ShuffledStage(nn.Sequential):
    """A stage of blocks that end before ReLU and shuffle; its output is after both."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input`` [B, c, h, w] to the stage's map."""
        return _run_stage(self, input)[0]


def _stage(plan: StagePlan) -> ShuffledStage:
    first = DownBlock(plan.in_channels, plan.out_channels, plan.stride)
    return ShuffledStage(first, *(SplitBlock(plan.out_channels) for _ in range(plan.blocks - 1)))


def _run_stage(blocks: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stage and its pre-activation."""
    preact = x
    for block in blocks:
        preact = block(x)
        x = shuffle_channels(F.relu(preact), groups=2)
    return x, preact
