"""VGG with BatchNorm and one linear classifier: Simonyan & Zisserman, "Very Deep
Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.

A stage is the map after its last ReLU; its pre-activation is the output of its last BatchNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, fx, nn

from sskd.models.features import Features, initialise_convolutions, pool_and_classify

WIDTHS = (64, 128, 256, 512, 512)
# Up to this image size, the published networks have no pooling in front of the last block.
SMALL_IMAGE = 32


@fx.wrap  # a traced network decides by the size of its input, at run time
def pool_large(stage: Tensor, image: Tensor) -> Tensor:
    """Max-pool ``stage`` to half its size if ``image`` is larger than 32x32."""
    return F.max_pool2d(stage, 2) if image.shape[-1] > SMALL_IMAGE else stage


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions: the stem and four stages.

    ``convolutions`` is the number of convolutions in each block.
    """

    designed_size: ClassVar[int] = SMALL_IMAGE

    def __init__(self, num_classes: int, *, convolutions: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.block0 = _block(convolutions[0], 3, WIDTHS[0])
        self.block1 = _block(convolutions[1], WIDTHS[0], WIDTHS[1])
        self.block2 = _block(convolutions[2], WIDTHS[1], WIDTHS[2])
        self.block3 = _block(convolutions[3], WIDTHS[2], WIDTHS[3])
        self.block4 = _block(convolutions[4], WIDTHS[3], WIDTHS[4])
        self.classifier = nn.Linear(WIDTHS[4], num_classes)
        initialise_convolutions(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages.

        Images larger than 32x32 are max-pooled once more, between the last two blocks.
        """
        stem = F.relu(self.block0(x))
        preact1 = self.block1(F.max_pool2d(stem, 2))
        stage1 = F.relu(preact1)
        preact2 = self.block2(F.max_pool2d(stage1, 2))
        stage2 = F.relu(preact2)
        preact3 = self.block3(F.max_pool2d(stage2, 2))
        stage3 = F.relu(preact3)
        preact4 = self.block4(pool_large(stage3, x))
        stage4 = F.relu(preact4)
        return pool_and_classify(
            stage4,
            self.classifier,
            stem=stem,
            stages=(stage1, stage2, stage3, stage4),
            preacts=(preact1, preact2, preact3, preact4),
        )

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map.

        Behind the last stage, they are like the last two blocks, without pooling.
        """
        last = len(WIDTHS) - 1
        numbers = range(stage + 1, last + 1) if stage < last else (last - 1, last)
        channels, blocks = WIDTHS[stage], []
        for number in numbers:
            blocks.append(_block(self.convolutions[number], channels, WIDTHS[number]))
            channels = WIDTHS[number]
        branch = VGGBranch(blocks, pools=stage < last)
        initialise_convolutions(branch)
        return branch


class VGGBranch(nn.Module):
    """The last blocks of a network: if ``pools``, with max-pooling in front of all but the last."""

    def __init__(self, blocks: Sequence[nn.Module], *, pools: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.pools = pools

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, c, h, w] to the last map."""
        *first, last = self.blocks
        for block in first:
            x = F.relu(block(F.max_pool2d(x, 2) if self.pools else x))
        # Of a 32x32 image this map is 4x4; that of a larger image is pooled once more.
        is_large = self.pools and x.shape[-1] > SMALL_IMAGE // 8
        return F.relu(last(F.max_pool2d(x, 2) if is_large else x))


def _block(convolutions: int, in_channels: int, out_channels: int) -> nn.Sequential:
    """Repeat convolution, BatchNorm and ReLU; the last ReLU is omitted."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])
