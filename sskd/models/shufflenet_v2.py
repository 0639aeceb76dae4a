"""ShuffleNet V2 at width 1: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design", ECCV 2018, with a 1x1 stem of stride 1 and no max-pool.

A stage is the map after the shuffle of its last block. Its pre-activation is the input of that
block's ReLU, both halves concatenated, before the shuffle. PyTorch's default initialisation is
used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import Features
from sskd.models.shufflenet_v1 import shuffle_channels

STEM_CHANNELS = 24
LAST_CHANNELS = 1024


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
    """Two branches of stride 2, each half of the output; returns before ReLU and shuffle."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = _depthwise(in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise(half)
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

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1 = _stage(4, STEM_CHANNELS, 116)
        self.layer2 = _stage(8, 116, 232)
        self.layer3 = _stage(4, 232, 464)
        self.conv2 = nn.Conv2d(464, LAST_CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(LAST_CHANNELS)
        self.linear = nn.Linear(LAST_CHANNELS, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with three stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        stage1, preact1 = _run_stage(self.layer1, stem)
        stage2, preact2 = _run_stage(self.layer2, stage1)
        stage3, preact3 = _run_stage(self.layer3, stage2)
        pooled = F.relu(self.bn2(self.conv2(stage3))).mean(dim=(2, 3))
        stages, preacts = (stage1, stage2, stage3), (preact1, preact2, preact3)
        return Features(
            logits=self.linear(pooled), pooled=pooled, stem=stem, stages=stages, preacts=preacts
        )


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)


def _stage(blocks: int, in_channels: int, out_channels: int) -> nn.Sequential:
    others = (SplitBlock(out_channels) for _ in range(blocks - 1))
    return nn.Sequential(DownBlock(in_channels, out_channels), *others)


def _run_stage(blocks: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stage and its pre-activation."""
    preact = x
    for block in blocks:
        preact = block(x)
        x = shuffle_channels(F.relu(preact), groups=2)
    return x, preact
