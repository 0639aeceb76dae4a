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
    """Draw ``count`` rectangles in images of ``height`` x ``width`` pixels.

    Returns:
        See ``place_rectangles``.
    """
    sizes = torch.tensor([[height, width]]).expand(count, 2)
    return place_rectangles(draw_numbers(count, generator), sizes)


def draw_numbers(count: int, generator: torch.Generator) -> Tensor:
    """Draw what decides ``count`` rectangles: uniform in [0, 1), float64 [count, 22]."""
    shapes = ((count, TRIES), (count, TRIES), (count, 2))
    return torch.cat(
        [torch.rand(each, generator=generator, dtype=torch.float64) for each in shapes], dim=1
    )


def place_rectangles(numbers: Tensor, bounds: Tensor) -> Tensor:
    """Return the rectangles that ``numbers`` [N, 22] of ``draw_numbers`` decide.

    A rectangle that does not fit into the image is drawn again, up to ten times. Then it is the
    largest one in the centre whose aspect ratio is allowed: in a square, the whole image.

    Args:
        bounds: height and width of each image in pixels, int64 [N, 2].

    Returns:
        Top, left, height and width in whole pixels, float64 [N, 4].
    """
    areas, aspects, places = numbers.split([TRIES, TRIES, 2], dim=1)
    area = _between(AREA, areas) * bounds.prod(1, keepdim=True)
    aspect = _between((math.log(ASPECT[0]), math.log(ASPECT[1])), aspects).exp()
    sizes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1).round()
    fits = ((sizes >= 1) & (sizes <= bounds[:, None])).all(-1)
    first = fits.long().argmax(1)[:, None, None].expand(-1, 1, 2)
    drawn = sizes.gather(1, first).squeeze(1)
    corners = (places * (bounds - drawn + 1)).floor()
    # Of the height for this width, and of the width for this height.
    longest = (bounds.flip(1) * torch.tensor([1 / ASPECT[0], ASPECT[1]]).double()).round()
    central = torch.minimum(bounds, longest)
    centre = torch.div(bounds - central, 2, rounding_mode="floor")
    any_fits = fits.any(1, keepdim=True)
    return torch.cat([corners.where(any_fits, centre), drawn.where(any_fits, central)], dim=1)


def _between(bounds: tuple[float, float], numbers: Tensor) -> Tensor:
    low, high = bounds
    return low + (high - low) * numbers
