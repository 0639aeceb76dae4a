"""Strong views: RandAugment and Cutout of whole batches, on the device of the images.

Cubuk et al., "RandAugment", NeurIPS 2020, and DeVries and Taylor, "Cutout", 2017, as the code of
MLLD (Jin et al., CVPR 2023) and of CRLD (Zhang et al., ACM MM 2024) applies them after crop and
flip, in ``mdistiller/dataset/cifar100.py``. That code ignores the magnitude of its
``RandAugment(2, 10)``: it draws each magnitude uniformly from the whole range of its operation.

The random choices (``draw_strong``) are separate from the pixels (``StrongView``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.data.operations import COLUMNS, LEVELS, ONE, OperationBatch, Operations

SQUARE = 4  # columns of Cutout
GRAY = (125, 123, 114)  # the authors' colour of Cutout


class Operation(IntEnum):
    """The operations of RandAugment, all equally likely."""

    AUTOCONTRAST = 0
    BRIGHTNESS = 1
    COLOR = 2
    CONTRAST = 3
    EQUALIZE = 4
    IDENTITY = 5
    POSTERIZE = 6
    ROTATE = 7
    SHARPNESS = 8
    SHEAR_X = 9
    SHEAR_Y = 10
    SOLARIZE = 11
    TRANSLATE_X = 12
    TRANSLATE_Y = 13


# The lowest and the highest magnitude: factors of ImageEnhance, bits, degrees counter-clockwise,
# slopes, levels, shares of the side. An operation that is not here has no magnitude.
RANGES = {
    Operation.BRIGHTNESS: (0.05, 0.95),
    Operation.COLOR: (0.05, 0.95),
    Operation.CONTRAST: (0.05, 0.95),
    Operation.POSTERIZE: (4, 8),
    Operation.ROTATE: (-30, 30),
    Operation.SHARPNESS: (0.05, 0.95),
    Operation.SHEAR_X: (-0.3, 0.3),
    Operation.SHEAR_Y: (-0.3, 0.3),
    Operation.SOLARIZE: (0, 256),
    Operation.TRANSLATE_X: (-0.3, 0.3),
    Operation.TRANSLATE_Y: (-0.3, 0.3),
}

# What these mix an image with, by a factor: its mean gray, its gray copy, its smooth copy, black.
BLENDS = (Operation.CONTRAST, Operation.COLOR, Operation.SHARPNESS, Operation.BRIGHTNESS)


@dataclass(frozen=True)
class StrongAugmentation:
    """The settings of a strong view; the defaults are the authors'.

    ``operations`` is the number of operations of RandAugment, drawn with replacement. ``cutout`` is
    the longest side of Cutout's square, as a share of the image's; 0 for no square.
    """

    operations: int = 2
    cutout: float = 0.5


def draw_strong(
    images: int, side: int, settings: StrongAugmentation, generator: torch.Generator
) -> Tensor:
    """Draw a strong view for each image of ``side`` pixels; return the parameters of the views.

    They are int32 [images, 14 * operations + 4], for ``StrongView``, on the CPU as ``generator``.
    """
    shape = (images, settings.operations)
    ranges = torch.tensor([RANGES.get(each, (0, 0)) for each in Operation], dtype=torch.float64)
    operations = torch.randint(len(ranges), shape, generator=generator)
    low, high = ranges[operations].unbind(-1)
    magnitudes = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    length, x, y = torch.rand(3, images, generator=generator, dtype=torch.float64)
    # The authors' np.random.uniform(side) is between 1 and the side, not 0 and the side.
    centres = 1 + (side - 1) * torch.stack([x, y])
    squares = square_columns(settings.cutout * side * length, centres)
    return torch.cat([operation_columns(operations, magnitudes, side).flatten(1), squares], dim=1)


def operation_columns(operations: Tensor, magnitudes: Tensor, side: int) -> Tensor:
    """Return the columns of ``OperationBatch``, int32.

    ``operations``, int64, and ``magnitudes``, float64, have the same shape. The result has one more
    dimension, of 14 columns.
    """
    chosen = F.one_hot(operations, len(Operation)).unbind(-1)
    blends = torch.stack([chosen[each] for each in BLENDS])
    factor = torch.where(blends.any(0), _fixed(magnitudes), ONE)
    of_mean, of_gray, of_smooth, _ = (ONE - factor) * blends
    bits = torch.where(chosen[Operation.POSTERIZE] > 0, magnitudes.floor(), 8)
    columns = [
        *_maps([each * magnitudes for each in chosen], side),
        *(factor + of_smooth, of_mean, of_gray, of_smooth),
        -(2 ** (8 - bits)),
        torch.where(chosen[Operation.SOLARIZE] > 0, magnitudes.ceil(), LEVELS),
        chosen[Operation.AUTOCONTRAST],
        2 * chosen[Operation.EQUALIZE],
    ]
    return torch.stack([each.int() for each in columns], dim=-1)


def _maps(magnitudes: Sequence[Tensor], side: int) -> list[Tensor]:
    """Return the six numbers of ``OperationBatch.maps``, for the magnitude of each operation or 0.

    A shear leaves the upper left corner of the image in its place, a rotation the centre.
    """
    angle = magnitudes[Operation.ROTATE].deg2rad()
    cos, sin = angle.cos(), angle.sin()
    across = magnitudes[Operation.SHEAR_X] - sin
    down = magnitudes[Operation.SHEAR_Y] + sin
    left = side * magnitudes[Operation.TRANSLATE_X] + side / 2 * (1 - cos + sin)
    top = side * magnitudes[Operation.TRANSLATE_Y] + side / 2 * (1 - cos - sin)
    # A pixel is at its centre, half a pixel from its upper left corner.
    left, top = left + (cos + across) / 2, top + (cos + down) / 2
    return [_fixed(each) for each in (cos, across, left, down, cos, top)]


def _fixed(numbers: Tensor) -> Tensor:
    return (numbers * ONE + 0.5).floor()


def square_columns(lengths: Tensor, centres: Tensor) -> Tensor:
    """Return Cutout's squares, int32 [N, 4]: first column and row, last column and row.

    ``lengths`` [N] and ``centres`` [2, N] (x and y) are in pixels. As in the authors' code, the
    left and the upper border of the image move a square, and the others cut it.
    """
    first = (centres - lengths / 2).clamp(min=0).floor()
    last = torch.where(lengths > 0, (first + lengths).floor(), -1)
    return torch.cat([first, last]).T.int()


class StrongView:
    """Makes strong views of images of ``side`` pixels, on ``device``.

    A CUDA graph can contain it: shapes are static, and the host never waits for the device.
    """

    def __init__(self, side: int, device: torch.device) -> None:
        self._operate = Operations(side, device)
        self._place = torch.arange(side, dtype=torch.int32, device=device)
        self._gray = torch.tensor(GRAY, dtype=torch.uint8, device=device).view(3, 1, 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the strong views of ``images``, both uint8 [N, 3, S, S].

        ``parameters`` [N, P] are rows of what ``draw_strong`` returns for ``side``.
        """
        for start in range(0, parameters.shape[1] - SQUARE, COLUMNS):
            batch = OperationBatch.of(parameters[:, start : start + COLUMNS])
            images = self._operate(images, batch)
        return self._cover(images, parameters[:, -SQUARE:])

    def _cover(self, images: Tensor, squares: Tensor) -> Tensor:
        first, last = squares[..., None].split(2, dim=1)
        columns, rows = ((self._place >= first) & (self._place <= last)).unbind(1)
        square = (rows[:, :, None] & columns[:, None])[:, None]
        return images * ~square + self._gray * square
