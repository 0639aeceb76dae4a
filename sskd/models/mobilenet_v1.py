"""MobileNet at width 1: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications", arXiv 2017, table 1.

The names and shapes of the tensors are those of the pytorch-mobilenet repository (marvis), which
the ImageNet code of the overhaul of feature distillation (Heo et al., ICCV 2019) and later
distillation codes have too. For images below 128 pixels, the first strides are 1
(``image_size.py``).

The stem is the first two blocks. A stage is the map after its last ReLU; its pre-activation is the
output of the BatchNorm in front of that ReLU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise

from torch import Tensor, nn

from sskd.models.features import (
    Features,
    StagePlan,
    build_branch,
    rectified_stage,
    run_rectified_stage,
    run_rectified_stages,
)
from sskd.models.image_size import first_reduction

STEM_CHANNELS = (32, 64)
PLAN = (
    StagePlan(2, 64, 128, stride=2),
    StagePlan(2, 128, 256, stride=2),
    StagePlan(6, 256, 512, stride=2),
    StagePlan(2, 512, 1024, stride=2),
)
# The positions in ``model`` at which the stages begin, and the end of the last one.
BOUNDS = tuple(accumulate((plan.blocks for plan in PLAN), initial=len(STEM_CHANNELS)))


class MobileNetV1(nn.Module):
    """A 3x3 convolution and 13 pairs of a depthwise 3x3 and a 1x1 convolution.

    ``image_size``, the pixels of a side, decides the strides of the stem and of the first stage:
    2 and 2 from 128 on, 1 and 2 from 64 on, else 1 and 1.
    """

    def __init__(self, num_classes: int, *, image_size: int) -> None:
        super().__init__()
        reduction = first_reduction(image_size)
        first, *others = PLAN
        plans = (first._replace(stride=min(reduction, 2)), *others)
        self.model = nn.Sequential(
            *_stem(stride=2 if reduction == 4 else 1),
            *(block for plan in plans for block in _stage(plan)),
        )
        self.fc = nn.Linear(PLAN[-1].out_channels, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Map images ``[B, 3, h, w]`` to ``Features`` with four stages."""
        blocks = list(self.model)
        stem, _ = run_rectified_stage(blocks[: BOUNDS[0]], x)
        stages = (blocks[start:end] for start, end in pairwise(BOUNDS))
        return run_rectified_stages(stages, stem, self.fc)

    def branch(self, stage: int) -> nn.Module:
        """Return new layers like those between the map of ``stage`` (from 1) and the last map."""
        return build_branch(PLAN, stage, _stage)


def _stem(stride: int) -> Iterator[nn.Module]:
    width, out_channels = STEM_CHANNELS
    convolution = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
    yield nn.Sequential(convolution, nn.BatchNorm2d(width))
    yield _separable(width, out_channels, stride=1)


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return a depthwise 3x3 and a 1x1 convolution, without the last ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


_stage = partial(rectified_stage, block=_separable)
