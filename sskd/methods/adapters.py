"""Modules and operations that adapt one network's features to the other's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.errors import UserError


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps ``[B, c, h, w]`` to the smaller one's height and width.

    The numbers of channels do not change.
    """
    (height, width), other = first.shape[2:], second.shape[2:]
    if (height, width) == other:
        return first, second
    size = min(height, other[0]), min(width, other[1])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)


def conv_regressor(student: torch.Size, teacher: torch.Size) -> nn.Sequential:
    """Return a convolution and a BatchNorm that map the student's maps to the teacher's shape.

    Romero et al., ICLR 2015, section 2.2, with the kernels of the CRD benchmark. If the student's
    maps are half as large as the teacher's: a transposed convolution, 4x4 with stride 2. If they
    are twice as large: 3x3 with stride 2. Else a kernel of the difference of the sizes plus one,
    without padding.

    Args:
        student: ``[c, h, w]`` of the student's maps.
        teacher: ``[c, h, w]`` of the teacher's maps.

    Raises:
        UserError: the student's maps are smaller than the teacher's, and not half as large.
    """
    (channels, size, _), (out_channels, out_size, _) = student, teacher
    convolution: nn.Module
    if 2 * size == out_size:
        convolution = nn.ConvTranspose2d(channels, out_channels, 4, stride=2, padding=1)
    elif size == 2 * out_size:
        convolution = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
    elif size >= out_size:
        convolution = nn.Conv2d(channels, out_channels, 1 + size - out_size)
    else:
        raise UserError(
            f"cannot map the student's {size}x{size} to the teacher's {out_size}x{out_size}: the "
            "student's map must be half as large, as large or larger; choose other networks"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class BatchNorm(nn.BatchNorm2d):
    """A BatchNorm of maps that may be 1x1, as a pooled feature is.

    A batch of one image then has a single value in each channel, and no variance. It is normalised
    by the running statistics.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [B, c, h, w]."""
        if self.training and input.numel() > input.shape[1]:
            return super().forward(input)
        mean, variance = self.running_mean, self.running_var
        return F.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)


class ProjectionHead(nn.Sequential):
    """SSKD's projection head on the pooled feature: Linear(d, d), ReLU, Linear(d, d)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
