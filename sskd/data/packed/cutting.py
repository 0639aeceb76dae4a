"""What worker processes do: decode images once, and cut squares out of them.

The random choices of a sample come from the seed of the epoch and the number of the sample alone.
So they depend neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from sskd.data.augmentation import draw_arrangements
from sskd.data.packed.file import PackedFile
from sskd.data.rectangles import draw_numbers, place_rectangles
from sskd.data.view_maker import Choices, Drawing, draw_choices
from sskd.errors import UserError
from sskd.seeding import derive_seed

T = TypeVar("T")

# An image is evaluated as its centre: its short side is scaled to 256 for a centre of 224.
CENTRE = (224, 256)


class Cuts(NamedTuple):
    """The cut images of B samples, and the choices for what is made of them on the device.

    Attributes:
        pixels: uint8 [B, k, 3, S, S]; k is the number of crops that are drawn for each sample.
        arrangements: how each view is flipped and arranged, int64 [B, views]; see
            ``draw_arrangements``.
        strong, transformed: see ``Choices``.
    """

    pixels: Tensor
    arrangements: Tensor
    strong: Tensor | None
    transformed: Tensor | None

    def to(self, device: torch.device) -> Cuts:
        """Return the same on ``device``; the host does not wait for a copy of pinned memory."""
        strong, transformed = (
            None if each is None else each.to(device, non_blocking=True)
            for each in (self.strong, self.transformed)
        )
        return Cuts(
            self.pixels.to(device, non_blocking=True),
            self.arrangements.to(device, non_blocking=True),
            strong,
            transformed,
        )


class TrainingRequest(NamedTuple):
    """The samples of a batch, of the epoch with this ``seed``."""

    seed: int
    samples: Sequence[int]


@dataclass(frozen=True)
class TrainingCuts(Dataset[Cuts | str]):
    """Cuts training samples out of the images at ``positions`` (int64 [N]) of a packed file.

    With strong copies, sample i and sample N + i are of the same image.
    """

    file: PackedFile
    positions: Tensor
    drawing: Drawing

    def __getitem__(self, request: TrainingRequest) -> Cuts | str:
        """Return the cuts of a request, or the message of a UserError."""
        return _or_message(lambda: self._cut(request))

    def _cut(self, request: TrainingRequest) -> Cuts:
        numbers, arrangements, choices = [], [], []
        for sample in request.samples:
            generator = torch.Generator().manual_seed(derive_seed(request.seed, sample))
            numbers.append(draw_numbers(self.drawing.cuts, generator))
            arrangements.append(draw_arrangements(1, self.drawing.views, generator))
            choices.append(draw_choices(1, self.drawing, generator))
        pixels = self._pixels(request.samples, torch.stack(numbers))
        return Cuts(pixels, torch.cat(arrangements), *_joined(choices))

    def _pixels(self, samples: Sequence[int], numbers: Tensor) -> Tensor:
        """Return the rectangles of each sample that ``numbers`` [B, k, 22] decide, scaled."""
        count, cuts, side = *numbers.shape[:2], self.drawing.side
        positions = self.positions[torch.tensor(samples) % len(self.positions)].tolist()
        bounds = self.file.sizes(positions).repeat_interleave(cuts, dim=0)
        boxes = place_rectangles(numbers.flatten(0, 1), bounds).int().unflatten(0, (count, cuts))
        pixels = torch.empty(count, cuts, 3, side, side, dtype=torch.uint8)
        for row, (position, parts) in enumerate(zip(positions, boxes.tolist(), strict=True)):
            image = self.file.image(position)
            for cut, (top, left, height, width) in enumerate(parts):
                part = image[:, top : top + height, left : left + width]
                pixels[row, cut] = resized(part, (side, side))
        return pixels


def _joined(choices: Sequence[Choices]) -> Choices:
    """Return the choices for single samples as those for a batch."""
    kinds = zip(*choices, strict=True)
    return Choices(*(None if each[0] is None else torch.cat(each) for each in kinds))


@dataclass(frozen=True)
class CentreCuts(Dataset[Tensor | str]):
    """Cuts the centre, a square of ``side`` pixels, out of each image of a packed file."""

    file: PackedFile
    side: int

    def __getitem__(self, positions: Sequence[int]) -> Tensor | str:
        """Return uint8 [B, 3, S, S] of the images at ``positions``, or an error's message."""
        return _or_message(lambda: torch.stack([self._cut(each) for each in positions]))

    def _cut(self, position: int) -> Tensor:
        return central(self.file.image(position), self.side)


def central(image: Tensor, side: int) -> Tensor:
    """Scale the short side of ``image`` [3, H, W] to 8/7 of ``side``, and cut out the centre."""
    height, width = image.shape[1:]
    short, scaled = min(height, width), side * CENTRE[1] // CENTRE[0]
    image = resized(image, (scaled * height // short, scaled * width // short))
    cut: Tensor = functional.center_crop(image, [side, side])
    return cut


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale ``image``, uint8 [3, H, W], to ``size`` bilinearly, with antialias."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _or_message(work: Callable[[], T]) -> T | str:
    """Return the result of ``work``, or the message of its UserError.

    The main process would get an exception of a worker with the worker's traceback.
    """
    try:
        return work()
    except UserError as error:
        return str(error)
