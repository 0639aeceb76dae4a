"""Flips, rotations, jigsaws, random crops and normalisation of whole batches, on any device.

The random choices (``draw_crops``) are separate from the pixels (``Cropper``). So each crop has a
number, under which the outputs of a teacher for it can be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.data.strong import StrongAugmentation
from sskd.data.transformations import Transformations

PADDING = 4  # pixels on each side
QUARTER_TURNS = 4
OFFSETS = 2 * PADDING + 1  # positions of a crop along one axis
CROPS = 2 * OFFSETS**2  # crops of one view of an image: flipped or not, at any offset
# The orders of 2 x 2 patches; the first one is that of the image.
JIGSAWS = tuple(permutations(range(4)))


@dataclass(frozen=True)
class Views:
    """The views of each image in a batch.

    Attributes:
        rotations: 1 to 4; view v is rotated by v quarter turns counter-clockwise.
        one_crop: the views of an image are rotations of the same crop (Yang et al., IJCAI 2021)
            instead of crops of their own (Xu et al., ECCV 2020).
        strong: if given, as many strong views follow these weak ones, with crops of their own.
        transformed: if given, transformed views follow one normal view, with crops of their own.
        jigsaws: views that follow one normal view; each has a crop of its own, whose 2 x 2 patches
            are in a random other order.
    """

    rotations: int = 1
    one_crop: bool = False
    strong: StrongAugmentation | None = None
    transformed: Transformations | None = None
    jigsaws: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.rotations <= QUARTER_TURNS:
            raise ValueError(f"rotations must be 1 to {QUARTER_TURNS}, not {self.rotations}")
        kinds = [self.rotations > 1, self.strong, self.transformed, self.jigsaws]
        if (self.transformed or self.jigsaws) and sum(map(bool, kinds)) > 1:
            raise ValueError("transformed views and jigsaws follow one normal view alone")

    @property
    def crops(self) -> int:
        """Views of each image without the strong ones."""
        transformed = self.transformed.views if self.transformed else 0
        return self.rotations + transformed + self.jigsaws

    @property
    def drawn_crops(self) -> int:
        """Crops of each image that are drawn, for the views of one kind: weak or strong."""
        return 1 if self.one_crop else self.crops

    @property
    def count(self) -> int:
        """Views of each image."""
        return self.crops * (2 if self.strong else 1)

    @property
    def are_rotations(self) -> bool:
        """Whether there are only rotations, of which each has one of 162 crops."""
        return not (self.strong or self.transformed or self.jigsaws)


ONE_VIEW = Views()


def draw_crops(images: int, views: Views, generator: torch.Generator) -> Tensor:
    """Draw one crop for each view of each image; return their numbers, int64 [images, views].

    Half of the images are flipped left to right, with all of their views. Each view is rotated,
    padded with 4 black pixels on each side and cropped to its original size. Its offset is uniform
    in 0..8 on both axes. This is the augmentation of Xu et al., ECCV 2020; with one view it is the
    usual augmentation of CIFAR (He et al., CVPR 2016).

    The number of a crop is ``((v * 2 + flipped) * 9 + top) * 9 + left``: 162 crops for each view.
    v is the number of quarter turns of a rotation, the order of a jigsaw's patches (its place in
    ``JIGSAWS``), and 0 for a view that is transformed later.
    """
    weak = _draw_rotations(images, views, generator)
    return torch.cat([weak, _draw_rotations(images, views, generator)], 1) if views.strong else weak


def draw_arrangements(images: int, views: Views, generator: torch.Generator) -> Tensor:
    """Draw what ``draw_crops`` draws, all at the offset 0: the crops are drawn elsewhere.

    The numbers are ``(v * 2 + flipped) * 81``, int64 [images, views].
    """
    kinds = []
    for _ in range(2 if views.strong else 1):
        flip = _draw_flips(images, generator)
        kinds.append((_draw_orders(images, views, generator) * 2 + flip) * OFFSETS**2)
    return torch.cat(kinds, dim=1)


def _draw_rotations(images: int, views: Views, generator: torch.Generator) -> Tensor:
    flip = _draw_flips(images, generator)
    shape = (2, images, views.drawn_crops)
    top, left = torch.randint(OFFSETS, shape, generator=generator, device=generator.device)
    if views.one_crop:
        top, left = _rotated_offsets(top, left, views.rotations)
    orders = _draw_orders(images, views, generator)
    return ((orders * 2 + flip) * OFFSETS + top) * OFFSETS + left


def _draw_flips(images: int, generator: torch.Generator) -> Tensor:
    return torch.rand(images, 1, generator=generator, device=generator.device) < 0.5


def _draw_orders(images: int, views: Views, generator: torch.Generator) -> Tensor:
    """Return the quarter turns of rotations and the orders of jigsaws: int64 [images, crops]."""
    device = generator.device
    orders = torch.zeros(images, views.crops, dtype=torch.int64, device=device)
    orders[:, : views.rotations] = torch.arange(views.rotations, device=device)
    if views.jigsaws:
        shape = (images, views.jigsaws)
        others = torch.randint(1, len(JIGSAWS), shape, generator=generator, device=device)
        orders[:, views.rotations :] = others
    return orders


def _rotated_offsets(top: Tensor, left: Tensor, rotations: int) -> tuple[Tensor, Tensor]:
    """Return the offsets [images, rotations] at which the rotated images have the same crop.

    ``top`` and ``left``, [images, 1], are those in the image that is not rotated. A quarter turn
    counter-clockwise moves the right edge to the top, and the top edge to the left.
    """
    tops, lefts = [top], [left]
    for _ in range(rotations - 1):
        tops, lefts = [*tops, OFFSETS - 1 - lefts[-1]], [*lefts, tops[-1]]
    return torch.cat(tops, dim=1), torch.cat(lefts, dim=1)


class Cropper:
    """Cuts crops out of ``images``, uint8 [N, 3, S, S], by one gather, in at most ``rotations``.

    With ``jigsaws``, for which S must be even, a crop can have its patches in any order.

    A table has the position in the image of each pixel of each crop, so that a GPU starts four
    kernels for a batch of any crops.

    Attributes:
        images: what the crops are cut out of. While they exist, no other tensor has their id.
    """

    def __init__(self, images: Tensor, rotations: int, *, jigsaws: bool = False) -> None:
        self.images = images
        count, channels, self._side = len(images), images.shape[1], images.shape[2]
        self._pixels_of_image = self._side**2 + 1
        pixels = images.new_zeros(count, self._pixels_of_image, channels)  # the last one is black
        pixels[:, :-1] = images.permute(0, 2, 3, 1).flatten(1, 2)
        self._pixels = pixels.flatten(0, 1)
        positions = _pixel_positions(self._side, rotations)
        if jigsaws:
            orders = jigsaw_positions(self._side).unbind()
            positions = torch.cat([positions.index_select(1, order) for order in orders])
        self._positions = positions.to(images.device)

    def __call__(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Return the ``crops`` [B, k] of the images ``indices`` [B]: uint8 [B * k, 3, S, S].

        ``crops`` are numbers from ``draw_crops``. The host never waits for the device. The result
        is channels last in memory, the layout that the networks take.
        """
        positions = self._positions.index_select(0, crops.flatten())
        first = indices * self._pixels_of_image
        positions = positions.view(*crops.shape, -1) + first[:, None, None]
        pixels = self._pixels.index_select(0, positions.flatten())
        return pixels.view(-1, self._side, self._side, pixels.shape[1]).permute(0, 3, 1, 2)


def _pixel_positions(side: int, rotations: int) -> Tensor:
    """Return where each crop has its pixels from: int64 [162 * rotations, S * S].

    A position is ``row * S + column`` in the image, or ``S * S`` for a black pixel.
    """
    upright = torch.arange(side**2).view(side, side)
    tables = []
    for turns in range(rotations):
        for image in (upright, upright.flip(1)):
            turned = torch.rot90(image, turns, (0, 1))
            padded = F.pad(turned, [PADDING] * 4, value=side**2)
            offsets = padded.unfold(0, side, 1).unfold(1, side, 1)
            tables.append(offsets.reshape(OFFSETS**2, side**2))
    return torch.cat(tables)


def jigsaw_positions(side: int) -> Tensor:
    """Return the source of each pixel of a crop, for each order of its patches: [24, S * S]."""
    half = side // 2
    pixels = torch.arange(side**2).view(2, half, 2, half)
    patches = pixels.transpose(1, 2).reshape(4, half, half)
    placed = patches[torch.tensor(JIGSAWS)].view(-1, 2, 2, half, half)
    return placed.transpose(2, 3).flatten(1)


class Normaliser:
    """Turns images [N, 3, H, ``width``] of 0..255 into normalised float32, channels last in memory.

    ``mean`` and ``std`` hold one value for each channel, in units of [0, 1].
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, width: int, device: torch.device
    ) -> None:
        # Rows of an image instead of pixels: an inner loop over three values would be slow.
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=device).repeat(width)
            for values in (mean, std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(images / 255 - mean) / std``."""
        pixels = images.permute(0, 2, 3, 1)
        rows = pixels.reshape(-1, len(self._mean)).to(torch.float32, copy=True)
        rows.div_(255).sub_(self._mean).div_(self._std)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)
