"""MobileNetV2 at half width: Sandler et al., "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", CVPR 2018, with ReLU instead of ReLU6 and the strides of both published code bases.

Blocks end without a ReLU, so the pre-activation of a stage is the stage itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from sskd.models.features import Features, initialise_convolutions, pool_and_classify

STEM_CHANNELS = 16
LAST_CHANNELS = 1280


class Group(NamedTuple):
    """Consecutive blocks with the same channels; ``stride`` is that of the first block."""

    expansion: int
    channels: int
    blocks: int
    stride: int


GROUPS = (
    Group(1, 8, 1, 1),
    Group(6, 12, 2, 1),
    Group(6, 16, 3, 2),
    Group(6, 32, 4, 2),
    Group(6, 48, 3, 1),
    Group(6, 80, 3, 2),
    Group(6, 160, 1, 1),
)
# The groups whose output is a stage: the last one at each resolution.
STAGE_ENDS = (1, 2, 4, 6)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 convolution.

    The input is added if the shape stays the same.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.adds_input = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.adds_input else out


class MobileNetV2(nn.Module):
    """A stem of stride 2, seven groups of inverted residuals and a 1x1 convolution."""

    designed_size: ClassVar[int] = 32  # pixels of a side

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(STEM_CHANNELS),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.ModuleList(_groups(STEM_CHANNELS, GROUPS))
        self.conv2 = _last_convolution()
        linear = nn.Linear(LAST_CHANNELS, num_classes)
        self.classifier = nn.Sequential(linear)
        initialise_convolutions(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages."""
        stem = self.conv1(x)
        maps = []
        hidden = stem
        for group in self.blocks:
            hidden = group(hidden)
            maps.append(hidden)
        last_map = self.conv2(hidden)
        stages = tuple(maps[end] for end in STAGE_ENDS)
        return pool_and_classify(
            last_map,
            self.classifier,
            stem=stem,
            stages=stages,
            preacts=stages,
        )

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map.

        Behind the last stage, they are like the last stage with a stride of 1.
        """
        end = STAGE_ENDS[stage - 1]
        behind = GROUPS[end + 1 :]
        if not behind:
            first, *others = GROUPS[STAGE_ENDS[-2] + 1 :]
            behind = (first._replace(stride=1), *others)
        branch = nn.Sequential(*_groups(GROUPS[end].channels, behind), _last_convolution())
        initialise_convolutions(branch)
        return branch


def _groups(channels: int, plan: Sequence[Group]) -> Iterator[nn.Module]:
    """Yield the groups of ``plan``; the first one has an input of ``channels``."""
    for expansion, out_channels, blocks, stride in plan:
        first = InvertedResidual(channels, out_channels, stride, expansion)
        channels = out_channels
        others = (InvertedResidual(channels, channels, 1, expansion) for _ in range(blocks - 1))
        yield nn.Sequential(first, *others)


def _last_convolution() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(GROUPS[-1].channels, LAST_CHANNELS, 1, bias=False),
        nn.BatchNorm2d(LAST_CHANNELS),
        nn.ReLU(inplace=True),
    )
