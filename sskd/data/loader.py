"""Batches that are drawn and augmented on the device of the images, without worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sskd.data.augmentation import ONE_VIEW, Normaliser, Views
from sskd.data.augmenter import Augmenter
from sskd.data.batches import Batch, EpochLoader
from sskd.data.labelled import LabelledImages
from sskd.distributed.share import WHOLE, Share


class Loader(EpochLoader):
    """Shuffled and augmented batches of ``split``, on the device of its images.

    The order and the views of an epoch are drawn at its start, on the CPU, so the seed of an epoch
    determines all of its batches on any device. ``mean`` and ``std`` hold one value for each
    channel, in units of [0, 1].

    With ``strong_copies`` an epoch has each image twice, once with strong views.

    A batch is drawn on the device alone (``draw``), from tensors that stay in place. So a CUDA
    graph can contain it. ``advance`` then counts it on the host.
    """

    draws_on_device = True
    augmenter: Augmenter

    def __init__(
        self,
        split: LabelledImages,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: Views = ONE_VIEW,
        strong_copies: bool = False,
        share: Share = WHOLE,
    ) -> None:
        self._labels = split.labels
        self.augmenter = Augmenter(split.images, mean, std, views, strong_copies=strong_copies)
        samples = self.augmenter.samples
        super().__init__(
            split.device, samples=samples, batch_size=batch_size, views=views, share=share
        )
        self._order = torch.empty(samples, dtype=torch.int64, device=self.device)
        self._places = torch.arange(min(batch_size, samples), device=self.device)
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)  # of the next batch
        self.begin_epoch(0)

    def begin_epoch(self, seed: int) -> None:
        """Draw the order and the views of an epoch."""
        generator = torch.Generator().manual_seed(seed)
        self._order.copy_(torch.randperm(self.samples, generator=generator))
        self.augmenter.begin_epoch(generator)
        self._seed = seed
        self._move_to(0)

    def views_of(self, samples: Tensor) -> Tensor:
        """Return the images [views * B, 3, S, S] of ``samples`` [B] of the epoch."""
        return self.augmenter.views_of(samples)[0]

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
        super().advance()
        if self.next_size < self.share.size(self.batch_size):  # the last batch may be smaller
            self._move_to(self._position)

    def _move_to(self, position: int) -> None:
        super()._move_to(position)
        self._start.fill_(self._place(position)[0])


def eval_batches(
    split: LabelledImages, mean: Sequence[float], std: Sequence[float], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised images [B, 3, H, W] and labels [B], in order and without augmentation.

    B is at most ``batch_size``.
    """
    normalise = Normaliser(mean, std, width=split.size, device=split.device)
    for pixels, labels in split.pixel_batches(batch_size):
        yield normalise(pixels), labels
