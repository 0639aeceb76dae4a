"""Batches drawn and augmented on the device that holds the images, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sskd.data.images import Split

PADDING = 4
QUARTER_TURNS = 4
OFFSETS = 2 * PADDING + 1  # of a crop, each way
CROPS = 2 * OFFSETS**2  # that a view of an image can come in: flipped or not, at any offset


class Batch(NamedTuple):
    """One training step's images.

    ``x`` is float32 [views * B, 3, H, W], normalised, channels last in memory, image by
    image: row ``i * views + v`` is view v of image i. ``y`` is int64 [B]; ``index``, int64
    [B], holds the images' positions in the training split; ``crop``, int64 [views * B], tells
    which of its image's crops each row of ``x`` is (``draw_crops``).
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    crops: Tensor


class LoaderState(TypedDict):
    """Where a loader stands: the epoch's seed, its steps done, its generator's state."""

    seed: int
    position: int
    generator: Tensor


class Loader:
    """Shuffled, augmented batches of ``split``, on the device where its images lie.

    One generator on that device draws an epoch's order and its augmentation, so an epoch's
    seed fixes all of its batches. A new loader stands at the start of the epoch of seed 0.
    ``mean`` and ``std`` are a channel's, in units of [0, 1].
    """

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        views: int = 1,
    ) -> None:
        device = split.images.device
        # Pixel by pixel in memory: what the networks take, and three times fewer rows to crop.
        self._images = split.images.permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels
        self._mean, self._std = _per_channel(mean, device), _per_channel(std, device)
        self._batch_size = batch_size
        self._views = views
        self._generator = torch.Generator(device)
        self.begin_epoch(0)

    @property
    def steps(self) -> int:
        """Batches an epoch, the last and smaller one counted."""
        return -(-len(self._labels) // self._batch_size)

    @property
    def position(self) -> int:
        """Batches drawn in this epoch."""
        return self._position

    def begin_epoch(self, seed: int) -> None:
        """Seed the generator and draw the epoch's order."""
        self._seed = seed
        self._position = 0
        self._generator.manual_seed(seed)
        self._order = torch.randperm(
            len(self._labels), generator=self._generator, device=self._generator.device
        )

    def next_batch(self) -> Batch:
        """Draw the epoch's next batch. Raises IndexError after the last one."""
        if self._position >= self.steps:
            raise IndexError(f"all {self.steps} batches of the epoch are drawn")
        start = self._position * self._batch_size
        index = self._order[start : start + self._batch_size]
        crops = draw_crops(len(index), self._views, self._generator)
        x = self.crops_of(index, crops)
        self._position += 1
        return Batch(x, self._labels[index], index, crops.flatten())

    def crops_of(self, index: Tensor, crops: Tensor) -> Tensor:
        """Return given ``crops`` [B, k] of the images ``index`` [B], normalised, as ``Batch.x``."""
        images = self._images.index_select(0, index).permute(0, 3, 1, 2)
        return normalise(
            crop_views(images, crops, self._views).flatten(0, 1), self._mean, self._std
        )

    def state_dict(self) -> LoaderState:
        """Return all that is needed to go on in mid-epoch."""
        return {
            "seed": self._seed,
            "position": self._position,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Go on where ``state`` was taken, bit for bit.

        Raises:
            ValueError: it was taken of other data, where it would lie outside of the epoch.
        """
        if not isinstance(state["position"], int) or not 0 <= state["position"] <= self.steps:
            raise ValueError(f"step {state['position']} of {self.steps}")
        self.begin_epoch(state["seed"])
        self._position = state["position"]
        self._generator.set_state(state["generator"])


def eval_batches(
    split: Split, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images [B, 3, H, W] and labels [B] in their order, not augmented."""
    device = split.images.device
    channel_mean, channel_std = _per_channel(mean, device), _per_channel(std, device)
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        yield normalise(split.images[part], channel_mean, channel_std), split.labels[part]


def draw_crops(images: int, views: int, generator: torch.Generator) -> Tensor:
    """Draw a crop for each view of each image: its number, int64 [images, views].

    Half of the images are flipped left to right, with all of their views. View v is turned
    by v quarter turns counter-clockwise (``views`` is 1 to 4), padded with 4 black pixels
    on each side and cropped to its size at an offset of its own, uniform in 0..8 both ways.
    Xu et al., ECCV 2020; with one view, the usual augmentation of CIFAR (He et al., CVPR
    2016). The number is ``((v * 2 + flipped) * 9 + top) * 9 + left``, so a view has 162 crops.
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

    ``crops`` is int64 [B, k], numbers of ``draw_crops`` for at most ``views`` views, on the
    images' device; nothing waits for that device.
    """
    orientation = _orientations(images.device)[crops // OFFSETS**2]
    offset = crops % OFFSETS**2
    cropped = _crops(
        _flips_and_transposes(images.permute(0, 2, 3, 1), views),
        orientation,
        offset // OFFSETS,
        offset % OFFSETS,
    )
    return cropped.permute(0, 1, 4, 2, 3)


def _flips_and_transposes(pixels: Tensor, views: int) -> Tensor:
    """Return what ``_orientations`` chooses from, padded: uint8 [2 or 4, B, S + 8, S + 8, 3].

    ``pixels`` is uint8 [B, S, S, 3].
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
    """Return where a turned view's rows are found: int64 [2 * turns + flipped, 2].

    The first number names one of four drawings of the image: as it is, flipped left to right,
    transposed, transposed and then flipped. The second is 1 where the rows come from the bottom
    up. So a view is turned by the choice of the rows that are copied anyway.
    """
    upright, half_turn = [(0, 0), (1, 0)], [(1, 1), (0, 1)]
    quarter_turn, three_quarters = [(2, 1), (2, 0)], [(3, 0), (3, 1)]
    return torch.tensor(upright + quarter_turn + half_turn + three_quarters, device=device)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn uint8 [N, 3, H, W] into normalised float32, channels last in memory.

    ``mean`` and ``std`` are [3, 1, 1], in units of [0, 1], on the images' device.
    """
    pixels = images.permute(0, 2, 3, 1)
    # By rows of an image, not by pixels: three values are too few for a loop of their own.
    rows = pixels.reshape(-1, pixels.shape[2] * pixels.shape[3]).float()
    mean_row, std_row = (each.flatten().repeat(pixels.shape[2]) for each in (mean, std))
    rows.div_(255).sub_(mean_row).div_(std_row)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def _crops(padded: Tensor, orientation: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Cut out crops: uint8 [B, k, S, S, 3].

    ``padded`` is uint8 [drawings, B, S + 8, S + 8, 3]; ``orientation`` [B, k, 2] names the
    drawing, and whether its rows are taken from the bottom up; ``top`` and ``left`` are [B, k]. In
    memory as one line, a row of a crop is a run of ``3 * S`` bytes; copying such runs is what makes
    it fast on a CPU.
    """
    _, batch, padded_side, _, channels = padded.shape
    side, device = padded_side - 2 * PADDING, padded.device
    runs = padded.flatten().unfold(0, side * channels, 1)
    drawing, upwards = orientation[..., None].unbind(2)
    image = drawing * batch + torch.arange(batch, device=device)[:, None, None]
    line = torch.arange(side, device=device)
    row = image * padded_side + top[..., None]
    row = row + torch.where(upwards > 0, side - 1 - line, line)
    starts = (row * padded_side + left[..., None]) * channels
    crops = runs.index_select(0, starts.flatten())
    return crops.view(batch, top.shape[1], side, side, channels)


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
