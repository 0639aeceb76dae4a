"""The operations of RandAugment on whole batches: a map, a sum and a table for each image.

A map moves pixels, a sum mixes an image with copies of it, and a table replaces levels. Each
operation is one of the three, and the other two change nothing. So images with different operations
take the same steps: shapes are static, and the host needs no value. Numbers are whole, apart from
two quotients, which each device rounds in the same way. So the result has the same bits on every
device.

The pixels are those of Pillow (``Image.transform``, ``ImageEnhance``, ``ImageOps``), which the
authors of MLLD and CRLD call. Only autocontrast differs, by one level in 0.4 % of CIFAR-100's
pixels, because Pillow computes it with rounding errors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BITS = 16
ONE = 1 << BITS  # the number 1 with 16 binary places, the precision of ``Image.transform``
LEVELS = 256
COLUMNS = 14
LUMA = (19595, 38470, 7471)  # the weights of red, green and blue in gray, times ``ONE``


class OperationBatch(NamedTuple):
    """One operation for each of N images, int32.

    Pixel (x, y) shows what was at (a x + b y + c, d x + e y + f), and ``maps`` [N, 2, 3] is
    ((a, b, c), (d, e, f)) times ``ONE``. ``weights`` [N, 4] times ``ONE`` are those of the image,
    its mean gray, its gray copy, and its smooth copy less the image. A level i becomes
    ``i & mask``, and from ``threshold`` on ``255 - i``. ``stretch`` is 1 for autocontrast, and
    ``equalize`` 2 for equalize; else they are 0. These four are [N, 1].
    """

    maps: Tensor
    weights: Tensor
    mask: Tensor
    threshold: Tensor
    stretch: Tensor
    equalize: Tensor

    @classmethod
    def of(cls, columns: Tensor) -> OperationBatch:
        """Return the parts of ``columns``, int32 [N, 14]."""
        maps, weights, *levels = columns.split([6, 4, 1, 1, 1, 1], dim=1)
        return cls(maps.view(-1, 2, 3), weights, *levels)


class Operations:
    """Applies operations to images of ``side`` pixels on ``device``."""

    def __init__(self, side: int, device: torch.device) -> None:
        self._side = side
        self._place = torch.arange(side, dtype=torch.int32, device=device)
        self._levels = torch.arange(LEVELS, dtype=torch.int32, device=device)
        self._luma = torch.tensor(LUMA, dtype=torch.int32, device=device).view(3, 1, 1)
        self._one = torch.ones((), dtype=torch.int32, device=device)

    def __call__(self, images: Tensor, batch: OperationBatch) -> Tensor:
        """Return ``images``, uint8 [N, 3, S, S], after one operation on each."""
        mixed = self.mix(self.move(images, batch.maps), batch.weights)
        return self.replace_levels(mixed, batch)

    def move(self, images: Tensor, maps: Tensor) -> Tensor:
        """Return what ``maps`` show of ``images``, as the nearest pixels, black from outside."""
        of_x, of_y, origin = maps[..., None, None].unbind(2)
        places = (of_x * self._place + (of_y * self._place[:, None] + origin)) >> BITS
        nearest = places.clamp(0, self._side - 1)
        inside = (places == nearest).all(1).flatten(1)
        sources = torch.add(nearest[:, 0], nearest[:, 1], alpha=self._side).flatten(1).long()
        moved = images.flatten(2).gather(2, sources[:, None].expand(-1, images.shape[1], -1))
        return (moved * inside[:, None]).view(images.shape)

    def mix(self, images: Tensor, weights: Tensor) -> Tensor:
        """Return the sum of ``images`` and copies of them with ``weights``: int32 of their shape.

        A smooth pixel is the rounded mean of 3 x 3 pixels, the middle one counted 5 times. The
        pixels of the rim have none.
        """
        pixels = images.int()
        gray = ((pixels * self._luma).sum(1, keepdim=True, dtype=torch.int32) + ONE // 2) >> BITS
        area = self._side**2
        mean = (gray.sum((1, 2, 3), keepdim=True, dtype=torch.int32) + area // 2) // area
        of_image, of_mean, of_gray, of_smooth = weights[..., None, None, None].unbind(1)
        mixed = of_image * pixels + (of_gray * gray + of_mean * mean)
        rows = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
        inner = pixels[..., 1:-1, 1:-1]
        sums = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
        sums = torch.add(sums, inner, alpha=4)
        # Division by 13, exact for these sums; integer division takes five times as long.
        smooth = (sums * 20165 + (1 << 17)) >> 18
        mixed[..., 1:-1, 1:-1] += of_smooth * (smooth - inner)
        return mixed >> BITS

    def replace_levels(self, images: Tensor, batch: OperationBatch) -> Tensor:
        """Posterize, solarize, autocontrast or equalize ``images``, int32; return uint8 ones."""
        pixels = images.flatten(2)
        low, high = pixels.amin(2, keepdim=True), pixels.amax(2, keepdim=True)
        pixels, span = pixels.long(), high - low
        counts = images.new_zeros(*low.shape[:2], 1 + LEVELS)
        counts[..., 1:].scatter_add_(2, pixels, self._one.expand_as(pixels))
        below = counts.cumsum(2, dtype=torch.int32)[..., :-1]  # the pixels below each level
        share = below.gather(2, high.long()) // 255
        coarse = self._levels & batch.mask
        plain = torch.where(coarse < batch.threshold, coarse, 255 - coarse)
        stretched = (self._levels - low) * 255 / span.clamp(min=1)
        equalized = (below + share // 2) / share.clamp(min=1)
        tables = torch.stack([plain[:, None].expand_as(below), stretched, equalized], dim=2)
        # A channel with nothing to spread keeps its levels.
        stretch, equalize = batch.stretch[..., None], batch.equalize[..., None]
        table = stretch * span.clamp(max=1) + equalize * share.clamp(max=1)
        table = table.long()[..., None].expand(-1, -1, -1, LEVELS)
        chosen = tables.clamp(0, 255).to(torch.uint8).gather(2, table).squeeze(2)
        return chosen.gather(2, pixels).view(images.shape)
