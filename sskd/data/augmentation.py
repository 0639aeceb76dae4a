"""Flips, rotations, random crops and normalisation of whole batches, on any device.

The random choices (``draw_crops``) are separate from the pixels (``crop_views``). So each crop has
a number, under which the outputs of a teacher for it can be stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

PADDING = 4  # pixels on each side
QUARTER_TURNS = 4
OFFSETS = 2 * PADDING + 1  # positions of a crop along one axis
CROPS = 2 * OFFSETS**2  # crops of one view of an image: flipped or not, at any offset


def draw_crops(images: int, views: int, generator: torch.Generator) -> Tensor:
    """Draw one crop for each view of each image; return their numbers, int64 [images, views].

    Half of the images are flipped left to right, with all of their views. View v is rotated by v
    quarter turns counter-clockwise (``views`` is 1 to 4), padded with 4 black pixels on each side
    and cropped to its original size. Each view has its own offset, uniform in 0..8 on both axes.
    This is the augmentation of Xu et al., ECCV 2020; with one view it is the usual augmentation of
    CIFAR (He et al., CVPR 2016).

    The number of a crop is ``((v * 2 + flipped) * 9 + top) * 9 + left``: 162 crops for each view.
    """
    if not 1 <= views <= QUARTER_TURNS:
        raise ValueError(f"views must be 1 to {QUARTER_TURNS}, not {views}")
    device = generator.device
    flip = torch.rand(images, 1, generator=generator, device=device) < 0.5
    top, left = torch.randint(OFFSETS, (2, images, views), generator=generator, device=device)
    turn = torch.arange(views, device=device)
    return ((turn * 2 + flip) * OFFSETS + top) * OFFSETS + left


def crop_views(images: Tensor, crops: Tensor, views: int) -> Tensor:
    """Cut crops out of images: uint8 [B, 3, S, S] to uint8 [B, k, 3, S, S].

    ``crops`` are numbers from ``draw_crops`` for at most ``views`` views, int64 [B, k], on the
    device of the images. The host never waits for that device.
    """
    orientation = _orientations(images.device)[crops // OFFSETS**2]
    offset = crops % OFFSETS**2
    cropped = _cut_crops(
        _pad_orientations(images.permute(0, 2, 3, 1), views),
        orientation,
        offset // OFFSETS,
        offset % OFFSETS,
    )
    return cropped.permute(0, 1, 4, 2, 3)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 [N, 3, H, W] into normalised float32, channels last in memory.

    ``mean`` and ``std`` are [3, 1, 1], in units of [0, 1], on the device of the images.
    """
    pixels = images.permute(0, 2, 3, 1)
    # Rows of an image instead of pixels: an inner loop over three values would be slow.
    rows = pixels.reshape(-1, pixels.shape[2] * pixels.shape[3]).float()
    mean_row, std_row = (each.flatten().repeat(pixels.shape[2]) for each in (mean, std))
    rows.div_(255).sub_(mean_row).div_(std_row)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    """Return one value for each channel as float32 [3, 1, 1], as ``normalise`` takes them."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _pad_orientations(pixels: Tensor, views: int) -> Tensor:
    """Return padded copies of the images, the ones that ``_orientations`` refers to.

    ``pixels`` is uint8 [B, S, S, 3]. The result is uint8 [copies, B, S + 8, S + 8, 3], with 2
    copies for one view and 4 for several.
    """
    batch, side, _, channels = pixels.shape
    padded_side = side + 2 * PADDING
    shape = (2 if views == 1 else 4, batch, padded_side, padded_side, channels)
    padded = torch.zeros(shape, dtype=pixels.dtype, device=pixels.device)
    inner = padded[:, :, PADDING:-PADDING, PADDING:-PADDING]
    inner[0] = pixels
    inner[1] = pixels.flip(2)
    if views > 1:
        inner[2] = pixels.transpose(1, 2)
        inner[3] = inner[2].flip(2)
    return padded


@cache
def _orientations(device: torch.device) -> Tensor:
    """Return how each orientation is read from the copies: int64 [2 * turns + flipped, 2].

    The first number selects one of four copies of an image: unchanged, flipped left to right,
    transposed, transposed and then flipped. The second is 1 if the rows are read from the bottom
    up. So a rotation needs no copy of the image; it only changes which rows are copied.
    """
    upright, half_turn = [(0, 0), (1, 0)], [(1, 1), (0, 1)]
    quarter_turn, three_quarters = [(2, 1), (2, 0)], [(3, 0), (3, 1)]
    return torch.tensor(upright + quarter_turn + half_turn + three_quarters, device=device)


def _cut_crops(padded: Tensor, orientation: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Cut crops out of padded images: uint8 [B, k, S, S, 3].

    ``padded`` is uint8 [copies, B, S + 8, S + 8, 3]. ``orientation`` [B, k, 2] holds rows of
    ``_orientations``. ``top`` and ``left`` are [B, k]. In flat memory, one row of a crop is a run
    of ``3 * S`` bytes; copying whole runs makes this fast on a CPU.
    """
    _, batch, padded_side, _, channels = padded.shape
    side, device = padded_side - 2 * PADDING, padded.device
    runs = padded.flatten().unfold(0, side * channels, 1)
    copy, upwards = orientation[..., None].unbind(2)
    image = copy * batch + torch.arange(batch, device=device)[:, None, None]
    line = torch.arange(side, device=device)
    row = image * padded_side + top[..., None]
    row = row + torch.where(upwards > 0, side - 1 - line, line)
    starts = (row * padded_side + left[..., None]) * channels
    crops = runs.index_select(0, starts.flatten())
    return crops.view(batch, top.shape[1], side, side, channels)
