"""Wide residual networks: Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016.

Every BatchNorm and ReLU is in front of its convolution, so a stage is a sum without a ReLU. Its
pre-activation is the output of the BatchNorm after it: the first of the next stage, or ``bn1`` of
the network for the last stage. The value is taken from the regular forward pass, so that no
running statistics are updated twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sskd.models.features import (
    Features,
    StagePlan,
    initialise_convolutions,
    pool_and_classify,
    stages_behind,
)


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # The published weights use this name.
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum, and the output of ``bn1`` on ``x``."""
        normalised = self.bn1(x)
        active = F.relu(normalised)
        residual = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        # A convolution in the shortcut takes the activated input, the identity takes ``x``.
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + residual, normalised


class WideStage(nn.Module):
    """Consecutive blocks; the first one changes the width and the resolution."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__()
        first = WideBlock(plan.in_channels, plan.out_channels, plan.stride)
        width = plan.out_channels
        others = (WideBlock(width, width, stride=1) for _ in range(plan.blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stage, and the output of ``bn1`` of the first block on ``x``."""
        first, *others = self.layer
        x, normalised = first(x)
        for block in others:
            x, _ = block(x)
        return x, normalised


class WideBranch(nn.Module):
    """Stages, then the BatchNorm and the ReLU in front of the pooling."""

    def __init__(self, plan: Sequence[StagePlan]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(map(WideStage, plan))
        self.bn1 = nn.BatchNorm2d(plan[-1].out_channels)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, h, w] to the last map."""
        for stage in self.stages:
            x, _ = stage(x)
        return F.relu(self.bn1(x))


class WideResNet(nn.Module):
    """A network of ``depth = 6n + 4`` layers: three stages of ``n`` blocks.

    The stages have 16, 32 and 64 channels times ``widening``.
    """

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int, *, depth: int, widening: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        narrow, middle, wide = 16 * widening, 32 * widening, 64 * widening
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.plan = (
            StagePlan(blocks, 16, narrow, stride=1),
            StagePlan(blocks, narrow, middle, stride=2),
            StagePlan(blocks, middle, wide, stride=2),
        )
        self.block1, self.block2, self.block3 = map(WideStage, self.plan)
        self.bn1 = nn.BatchNorm2d(wide)
        self.fc = nn.Linear(wide, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with three stages."""
        stem = self.conv1(x)
        stage1, _ = self.block1(stem)
        stage2, preact1 = self.block2(stage1)
        stage3, preact2 = self.block3(stage2)
        preact3 = self.bn1(stage3)
        last_map = F.relu(preact3)
        return pool_and_classify(
            last_map,
            self.fc,
            stem=stem,
            stages=(stage1, stage2, stage3),
            preacts=(preact1, preact2, preact3),
        )

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return WideBranch(stages_behind(self.plan, stage))
