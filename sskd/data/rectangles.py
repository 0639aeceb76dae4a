"""Rectangles of random area and aspect ratio in an image: torchvision's ``RandomResizedCrop``.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AREA = (0.08, 1.0)  # of the rectangle, as a share of the image's
ASPECT = (3 / 4, 4 / 3)  # width / height of the rectangle
TRIES = 10  # draws of a rectangle until one fits into the image


def draw_rectangles(height: int, width: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` rectangles in an image of ``height`` x ``width`` pixels.

    A rectangle that does not fit into the image is drawn again, up to ten times. Then it is the
    largest one in the centre whose aspect ratio is allowed: in a square, the whole image.

    Returns:
        Top, left, height and width in whole pixels, float64 [count, 4] on the CPU.
    """
    tries = (count, TRIES)
    area = uniform(AREA, tries, generator) * (height * width)
    logarithms = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = uniform(logarithms, tries, generator).exp()
    sizes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1).round()
    bounds = torch.tensor([height, width])
    fits = ((sizes >= 1) & (sizes <= bounds)).all(-1)
    first = fits.long().argmax(1)[:, None, None].expand(-1, 1, 2)
    drawn = sizes.gather(1, first).squeeze(1)
    corners = (uniform((0, 1), (count, 2), generator) * (bounds - drawn + 1)).floor()
    central = _central(height, width)
    centre = torch.div(bounds - central, 2, rounding_mode="floor")
    any_fits = fits.any(1, keepdim=True)
    return torch.cat([corners.where(any_fits, centre), drawn.where(any_fits, central)], dim=1)


def _central(height: int, width: int) -> Tensor:
    """Return the height and width of the largest rectangle whose aspect ratio is allowed."""
    return torch.tensor(
        [min(height, round(width / ASPECT[0])), min(width, round(height * ASPECT[1]))]
    ).double()


def uniform(
    bounds: tuple[float, float], shape: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Draw numbers between ``bounds``, float64 of this ``shape``."""
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
