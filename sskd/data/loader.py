"""Batches that are drawn and augmented on the device of the images, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from sskd.data.augmentation import ONE_VIEW, Normaliser, Views
from sskd.data.augmenter import Augmenter
from sskd.data.images import Split
from sskd.data.share import WHOLE, Share


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
    """The state of a loader: the epoch's seed, and the batches drawn."""

    seed: int
    position: int


class Loader:
    """Shuffled and augmented batches of ``split``, on the device of its images.

    The order and the views of an epoch are drawn at its start, on the CPU, so the seed of an epoch
    determines all of its batches on any device. A new loader is at the start of an epoch with seed
    0. ``mean`` and ``std`` hold one value for each channel, in units of [0, 1].

    With ``strong_copies`` an epoch has each image twice, once with strong views.

    ``batch_size`` is that of all processes together; each draws its ``share`` of every batch.

    A batch is drawn on the device alone (``draw``), from tensors that stay in place. So a CUDA
    graph can contain it. ``advance`` then counts it on the host.
    """

    def __init__(
        self,
        split: Split,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: Views = ONE_VIEW,
        strong_copies: bool = False,
        share: Share = WHOLE,
    ) -> None:
        self.device = split.images.device
        self.batch_size = batch_size
        self.share = share
        self.views = views
        self._labels = split.labels
        self.augmenter = Augmenter(split.images, mean, std, views, strong_copies=strong_copies)
        self.samples = self.augmenter.samples
        self._order = torch.empty(self.samples, dtype=torch.int64, device=self.device)
        self._places = torch.arange(min(batch_size, self.samples), device=self.device)
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the next batch
        self.begin_epoch(0)

    @property
    def steps(self) -> int:
        """Batches in an epoch, including the last one, which may be smaller."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (self.share.size(rest) > 0)

    @property
    def position(self) -> int:
        """Batches drawn in this epoch."""
        return self._position

    @property
    def next_size(self) -> int:
        """Images in this process's share of the next batch; 0 at the end of the epoch."""
        return self.share.size(self._next_batch)

    @property
    def _next_batch(self) -> int:
        """Images that are left for the next batch of all processes."""
        left = self.samples - self._position * self.batch_size
        return min(self.batch_size, max(left, 0))

    def begin_epoch(self, seed: int) -> None:
        """Draw the order and the views of an epoch."""
        generator = torch.Generator().manual_seed(seed)
        self._order.copy_(torch.randperm(self.samples, generator=generator))
        self.augmenter.begin_epoch(generator)
        self._seed = seed
        self._move_to(0)

    def next_batch(self) -> Batch:
        """Draw the next batch of the epoch. Raises IndexError after the last one."""
        if self._position >= self.steps:
            raise IndexError(f"all {self.steps} batches of the epoch are drawn")
        batch = self.draw(self.next_size)
        self.advance()
        return batch

    def draw(self, size: int) -> Batch:
        """Draw ``size`` images of the next batch, on the device alone; ``advance`` follows."""
        batch = self.peek(size)
        self._start += size * self.share.ranks
        return batch

    def peek(self, size: int) -> Batch:
        """Return what ``draw`` will return, on the device alone."""
        samples = self._order.index_select(0, self._places[:size] + self._start)
        x, crops = self.augmenter.views_of(samples)
        indices = samples % len(self._labels)
        labels = self._labels.index_select(0, indices)
        return Batch(x, labels, indices, crops.flatten())

    def advance(self) -> None:
        """Count a batch that was drawn."""
        self._position += 1
        if self._next_batch < self.batch_size:  # the shares of a smaller batch are smaller
            self._move_to(self._position)

    def state_dict(self) -> LoaderState:
        """Return everything that is needed to resume in the middle of an epoch."""
        return {"seed": self._seed, "position": self._position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Resume at ``state``: bit for bit, if this version saved it.

        Raises:
            ValueError: the position is not in this epoch, because the data were different; or an
                earlier version drew the order of the epoch on a GPU.
        """
        if not isinstance(state["position"], int) or not 0 <= state["position"] <= self.steps:
            raise ValueError(f"step {state['position']} of {self.steps}")
        if "generator" in state and self.device.type != "cpu":
            # On a CPU that version drew the same order. Only the crops of the rest are others.
            raise ValueError("an earlier version drew the order of the epoch's images on the GPU")
        self.begin_epoch(state["seed"])
        self._move_to(state["position"])

    def _move_to(self, position: int) -> None:
        self._position = position
        self._start.fill_(position * self.batch_size + self.share.start(self._next_batch))


def eval_batches(
    split: Split, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images [B, 3, H, W] and labels [B], in order and without augmentation."""
    width, device = split.images.shape[-1], split.images.device
    normalise = Normaliser(mean, std, width=width, device=device)
    for start in range(0, len(split), batch_size):
        part = slice(start, start + batch_size)
        yield normalise(split.images[part]), split.labels[part]
