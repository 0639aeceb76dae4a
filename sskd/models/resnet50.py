"""ResNet-50 for small images: He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, table 1, with a 3x3 stem of stride 1 and no max-pool, as in both published code
bases for CIFAR-100.

A stage is the map after its last ReLU; its pre-activation is the sum in front of that ReLU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import Features, initialise_convolutions, run_rectified_stage
from sskd.models.shortcut import shortcut

EXPANSION = 4


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
        self.layer1 = _stage(3, 64, 64, stride=1)
        self.layer2 = _stage(4, 256, 128, stride=2)
        self.layer3 = _stage(6, 512, 256, stride=2)
        self.layer4 = _stage(3, 1024, 512, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages."""
        stem = F.relu(self.bn1(self.conv1(x)))
        stage1, preact1 = run_rectified_stage(self.layer1, stem)
        stage2, preact2 = run_rectified_stage(self.layer2, stage1)
        stage3, preact3 = run_rectified_stage(self.layer3, stage2)
        stage4, preact4 = run_rectified_stage(self.layer4, stage3)
        pooled = stage4.mean(dim=(2, 3))
        stages, preacts = (stage1, stage2, stage3, stage4), (preact1, preact2, preact3, preact4)
        return Features(
            logits=self.linear(pooled), pooled=pooled, stem=stem, stages=stages, preacts=preacts
        )


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = Bottleneck(in_channels, channels, stride)
    others = (Bottleneck(EXPANSION * channels, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)
