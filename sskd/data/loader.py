"""Batches that are drawn and augmented on the device of the images, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sskd.data.augmentation import crop_views, draw_crops, normalise, per_channel
from sskd.data.images import Split


class Batch(NamedTuple):
    """The images of one training step.

    ``x`` is float32 [views * B, 3, H, W], normalised, channels last in memory. Its row
    ``i * views + v`` is view v of image i. ``y`` is int64 [B]. ``indices``, int64 [B], are the
    positions of the images in the training split. ``crops``, int64 [views * B], is the number of
    the crop in each row of ``x`` (see ``draw_crops``).
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    crops: Tensor


class LoaderState(TypedDict):
    """The state of a loader: the epoch's seed, the batches drawn, the state of its generator."""

    seed: int
    position: int
    generator: Tensor


class Loader:
    """Shuffled and augmented batches of ``split``, on the device of its images.

    One generator on that device draws the order and the augmentation of an epoch, so the seed of
    an epoch determines all of its batches. A new loader is at the start of an epoch with seed 0.
    ``mean`` and ``std`` hold one value for each channel, in units of [0, 1].
    """

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: int = 1,
    ) -> None:
        device = split.images.device
        # Channels last: the layout that the networks take, and a third of the rows to crop.
        self._images = split.images.permute(0, 2, 3, 1).contiguous()
        self._labels = split.labels
        self._mean, self._std = per_channel(mean, device), per_channel(std, device)
        self._batch_size = batch_size
        self._views = views
        self._generator = torch.Generator(device)
        self.begin_epoch(0)

    @property
    def device(self) -> torch.device:
        """The device of the images, on which the batches are drawn."""
        return self._labels.device

    @property
    def steps(self) -> int:
        """Batches in an epoch, including the last one, which may be smaller."""
        return -(-len(self._labels) // self._batch_size)

    @property
    def position(self) -> int:
        """Batches drawn in this epoch."""
        return self._position

    def begin_epoch(self, seed: int) -> None:
        """Seed the generator and draw the order of the epoch."""
        self._seed = seed
        self._position = 0
        self._generator.manual_seed(seed)
        self._order = torch.randperm(
            len(self._labels), generator=self._generator, device=self._generator.device
        )

    def next_batch(self) -> Batch:
        """Draw the next batch of the epoch. Raises IndexError after the last one."""
        if self._position >= self.steps:
            raise IndexError(f"all {self.steps} batches of the epoch are drawn")
        start = self._position * self._batch_size
        indices = self._order[start : start + self._batch_size]
        crops = draw_crops(len(indices), self._views, self._generator)
        x = self.crops_of(indices, crops)
        self._position += 1
        return Batch(x, self._labels[indices], indices, crops.flatten())

    def crops_of(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Return the given ``crops`` [B, k] of the images ``indices`` [B], in the form of ``x``."""
        images = self._images.index_select(0, indices).permute(0, 3, 1, 2)
        return normalise(
            crop_views(images, crops, self._views).flatten(0, 1), self._mean, self._std
        )

    def state_dict(self) -> LoaderState:
        """Return everything that is needed to resume in the middle of an epoch."""
        return {
            "seed": self._seed,
            "position": self._position,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: LoaderState) -> None:
        """Resume at ``state``, bit for bit.

        Raises:
            ValueError: the position is not in this epoch, because the data were different.
        """
        if not isinstance(state["position"], int) or not 0 <= state["position"] <= self.steps:
            raise ValueError(f"step {state['position']} of {self.steps}")
        self.begin_epoch(state["seed"])
        self._position = state["position"]
        self._generator.set_state(state["generator"])


def eval_batches(
    split: Split, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images [B, 3, H, W] and labels [B], in order and without augmentation."""
    device = split.images.device
    channel_mean, channel_std = per_channel(mean, device), per_channel(std, device)
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        yield normalise(split.images[part], channel_mean, channel_std), split.labels[part]
