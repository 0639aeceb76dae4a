"""SSKD's transformations of whole batches, on the device of the images.

Xu, Liu, Li, Loy, "Knowledge Distillation Meets Self-Supervision", ECCV 2020, appendix 6.2: colour
dropping, rotation, crop and resize, and colour jitter. They are applied to an image after its flip
and its padded crop.

The random choices (``TransformedView.draw``) are separate from the pixels. A pixel is a float32
number in 0..255, which is not rounded. The operations are those of ``torchvision.transforms``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sskd.data.rectangles import draw_rectangles

LEVELS = 255.0  # the largest value of a pixel
# The weights of red, green and blue in grey: as the paper prints them, whose sum is 0.93, and those
# of torchvision.
PRINTED_WEIGHTS = (0.229, 0.587, 0.114)
LUMA_WEIGHTS = (0.2989, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# The smallest and the largest factor, and for the hue the largest shift, in turns of the circle.
JITTER = ((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1))


class Transformation(ABC):
    """A transformation of images of ``side`` pixels on ``device``.

    Attributes:
        neutral: the parameters with which it changes nothing, float32 [P].
    """

    neutral: Tensor

    def __init__(self, side: int, device: torch.device) -> None:
        self.side, self.device = side, device

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of ``count`` images, [count, P], on the CPU as ``generator``."""

    @abstractmethod
    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Transform ``images``, float32 [N, 3, S, S], with float32 ``parameters`` [N, P]."""


class ColourDropping(Transformation):
    """Replaces the three channels by their weighted sum."""

    neutral = torch.zeros(1)

    def __init__(self, side: int, device: torch.device) -> None:
        super().__init__(side, device)
        self._weights = torch.tensor(PRINTED_WEIGHTS, device=device).view(3, 1, 1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ones: nothing of it is random."""
        return torch.ones(count, 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Make the images with a parameter of 1 grey."""
        grey = (images * self._weights).sum(1, keepdim=True)
        return torch.where(parameters.view(-1, 1, 1, 1) > 0, grey, images)


class Rotation(Transformation):
    """Rotates by 90, 180 or 270 degrees counter-clockwise, all equally likely."""

    neutral = torch.zeros(1)

    def __init__(self, side: int, device: torch.device) -> None:
        super().__init__(side, device)
        upright = torch.arange(side**2).view(side, side)
        turned = [torch.rot90(upright, turns).flatten() for turns in range(4)]
        self._sources = torch.stack(turned).to(device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the quarter turns, 1 to 3."""
        return torch.randint(1, 4, (count, 1), generator=generator).float()

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Rotate by as many quarter turns as the parameter."""
        sources = self._sources.index_select(0, parameters.flatten().long())
        pixels = images.flatten(2)
        return pixels.gather(2, sources[:, None].expand_as(pixels)).view(images.shape)


class CropResize(Transformation):
    """Enlarges a rectangle of random area and aspect ratio to the whole image, bilinearly."""

    def __init__(self, side: int, device: torch.device) -> None:
        super().__init__(side, device)
        self.neutral = torch.tensor([0.0, 0.0, side, side])
        self._centres = torch.arange(side, device=device) + 0.5

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the rectangles: top, left, height and width, in pixels."""
        return draw_rectangles(self.side, self.side, count, generator).float()

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Enlarge the rectangles to the size of the images."""
        top, left, height, width = parameters.unbind(1)
        return self._enlarge(self._enlarge(images, 2, top, height), 3, left, width)

    def _enlarge(self, images: Tensor, dim: int, first: Tensor, length: Tensor) -> Tensor:
        """Interpolate ``length`` rows (dim 2) or columns (dim 3) of each image after ``first``."""
        places = (self._centres * (length / self.side)[:, None] - 0.5).clamp(min=0)
        lower = places.floor()
        upper = torch.minimum(lower + 1, length[:, None] - 1)
        shape = (-1, 1, self.side, 1) if dim == 2 else (-1, 1, 1, self.side)

        def taken(offsets: Tensor) -> Tensor:
            index = (first[:, None] + offsets).long().view(shape)
            return images.gather(dim, index.expand_as(images))

        share = (places - lower).view(shape)
        return taken(lower) * (1 - share) + taken(upper) * share


class ColourJitter(Transformation):
    """Changes brightness, contrast, saturation and hue, in an order that is drawn for each image.

    The parameters are the adjustments in their order, then the amount of each.
    """

    neutral = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])  # brightness times 1

    def __init__(self, side: int, device: torch.device) -> None:
        super().__init__(side, device)
        self._luma = torch.tensor(LUMA_WEIGHTS, device=device).view(3, 1, 1)
        self._sixths = torch.tensor([5.0, 3.0, 1.0], device=device).view(3, 1, 1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the order and the amounts."""
        order = torch.rand(count, len(JITTER), generator=generator).argsort(1)
        low, high = torch.tensor(JITTER).T
        amounts = low + (high - low) * torch.rand(count, len(JITTER), generator=generator)
        return torch.cat([order.float(), amounts.gather(1, order)], dim=1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Make the four adjustments."""
        kinds, amounts = parameters[..., None, None, None].chunk(2, dim=1)
        for kind, amount in zip(kinds.unbind(1), amounts.unbind(1), strict=True):
            shifted = self.shift_hue(images, amount)
            images = torch.where(kind == HUE, shifted, self.blend(images, kind, amount))
        return images

    def blend(self, images: Tensor, kind: Tensor, amount: Tensor) -> Tensor:
        """Mix ``images`` with black, with their mean grey or with their grey copies.

        ``kind`` and ``amount`` are [N, 1, 1, 1]. The amount is the weight of the image.
        """
        grey = (images * self._luma).sum(1, keepdim=True)
        mean = grey.mean((2, 3), keepdim=True)
        other = mean * (kind == CONTRAST) + grey * (kind == SATURATION)
        return (amount * images + (1 - amount) * other).clamp(0, LEVELS)

    def shift_hue(self, images: Tensor, turns: Tensor) -> Tensor:
        """Shift the hue of ``images`` by ``turns`` [N, 1, 1, 1], the range of hues being one turn.

        Each channel of the result is the largest one minus a share of the chroma, which depends on
        the distance of its hue (HSV written without cases).
        """
        red, green, blue = images.split(1, dim=1)
        high, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
        chroma = high - low
        divisor = chroma.where(chroma > 0, 1)
        of_green = 2 + (blue - red) / divisor
        of_blue = 4 + (red - green) / divisor
        hue = torch.where(high == green, of_green, of_blue)
        hue = torch.where(high == red, (green - blue) / divisor, hue) + 6 * turns
        place = (self._sixths + hue).remainder(6)
        return high - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


TRANSFORMATIONS: dict[str, type[Transformation]] = {
    "colour_dropping": ColourDropping,
    "rotation": Rotation,
    "crop_resize": CropResize,
    "colour_jitter": ColourJitter,
}


@dataclass(frozen=True)
class Transformations:
    """How the transformed views of an image are made.

    Attributes:
        pool: names in ``TRANSFORMATIONS``. One of them is drawn for each view.
        all_of_pool: each view has all of them instead, in the order of ``pool``.
        views: transformed views of an image.
    """

    pool: tuple[str, ...]
    all_of_pool: bool = False
    views: int = 3

    def __post_init__(self) -> None:
        if not self.pool or not set(self.pool) <= set(TRANSFORMATIONS):
            known = ", ".join(TRANSFORMATIONS)
            raise ValueError(f"pool must be a tuple of some of {known}, not {self.pool!r}")


class TransformedView:
    """Makes transformed views of images of ``side`` pixels, on ``device``.

    A CUDA graph can contain it: shapes are static, and the host never waits for the device. So each
    view takes the steps of the whole pool, with neutral parameters for what it does not have.
    """

    def __init__(self, settings: Transformations, side: int, device: torch.device) -> None:
        self._all_of_pool = settings.all_of_pool
        self._pool = [TRANSFORMATIONS[name](side, device) for name in settings.pool]
        self._columns = [len(each.neutral) for each in self._pool]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` views; return their parameters, float32 [count, P] on the CPU."""
        chosen = torch.randint(len(self._pool), (count, 1), generator=generator)
        parts = []
        for place, each in enumerate(self._pool):
            drawn = each.draw(count, generator)
            parts.append(drawn.where((chosen == place) | self._all_of_pool, each.neutral))
        return torch.cat(parts, dim=1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Return the float32 views of ``images`` [N, 3, S, S] with ``parameters`` of ``draw``."""
        made = images.float()
        for each, part in zip(self._pool, parameters.split(self._columns, dim=1), strict=True):
            made = each(made, part)
        return made
