"""Residual networks for ImageNet: He et al., "Deep Residual Learning for Image Recognition",
CVPR 2016, table 1, with the names and shapes of torchvision's tensors.

As in torchvision, the 3x3 convolution of a bottleneck has the stride. Images below 128 pixels have
another stem (``image_size.py``). The stem's map is the input of the first stage. A stage is the map
after its last ReLU; its pre-activation is the sum in front of that ReLU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
from sskd.models.image_size import first_reduction

STEM_CHANNELS = 64


class ImageNetResNet(nn.Module):
    """A stem of 64 channels and four stages of residual blocks.

    Args:
        image_size: pixels of a side, which decide the stem: from 128 on a 7x7 convolution of
            stride 2 and a max-pool; below, a 3x3 convolution, from 64 on with the max-pool.
        block: builds a block of its input channels, output channels and stride.
        blocks: the number of blocks in each stage.
        widths: the output channels of each stage.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        image_size: int,
        block: Callable[[int, int, int], nn.Module],
        blocks: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
    ) -> None:
        super().__init__()
        reduction = first_reduction(image_size)
        kernel, stride = (7, 2) if reduction == 4 else (3, 1)
        self.conv1 = nn.Conv2d(3, STEM_CHANNELS, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if reduction > 1 else nn.Identity()
        channels = (STEM_CHANNELS, *widths[:-1])
        self.plan = [
            StagePlan(*sizes) for sizes in zip(blocks, channels, widths, (1, 2, 2, 2), strict=True)
        ]
        self.build_stage = partial(rectified_stage, block=block)
        self.layer1, self.layer2, self.layer3, self.layer4 = map(self.build_stage, self.plan)
        self.fc = nn.Linear(widths[-1], num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages."""
        stem = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return run_rectified_stages(stages, stem, self.fc)

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return build_branch(self.plan, stage, self.build_stage)
