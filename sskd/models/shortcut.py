"""The shortcut of a residual block."""

from __future__ import annotations

from torch import nn


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or a strided 1x1 convolution with BatchNorm if the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
