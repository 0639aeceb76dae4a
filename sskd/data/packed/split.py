"""A part of the images of a packed file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sskd.data.augmentation import ONE_VIEW, Views
from sskd.data.packed.cutting import CentreCuts
from sskd.data.packed.file import PackedFile
from sskd.data.packed.loader import CutAugmenter, PackedLoader
from sskd.data.packed.workers import Workers
from sskd.distributed.share import WHOLE, Share

MOST_IN_BATCH = 256  # images of an evaluation: 37 MiB for each batch that a worker makes ahead
SAMPLE = 2000  # training images of which a mean and a standard deviation are computed


@dataclass(frozen=True)
class PackedSplit:
    """The images at ``positions`` (int64 [N], on the CPU) of a packed file; a ``LabelledImages``.

    Attributes:
        labels: int64 [N], on the device on which batches are made.
        size: pixels of a side of the cut images.
        workers: processes that decode images; 0 decodes them in this process.
        is_mirrored: the images are evaluated mirrored, left to right.
    """

    file: PackedFile
    positions: Tensor
    labels: Tensor
    size: int
    workers: int
    is_mirrored: bool = False

    has_numbered_crops = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def images(self) -> Tensor:
        """All images as they are evaluated; ``take`` a few of them first."""
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        return torch.cat([empty, *(pixels for pixels, _ in self.pixel_batches(MOST_IN_BATCH))])

    def take(self, indices: Tensor) -> PackedSplit:
        """Return the images at the positions ``indices`` (int64 [M])."""
        labels = self.labels[indices.to(self.device)]
        return replace(self, positions=self.positions[indices.cpu()], labels=labels)

    def to(self, device: torch.device | str) -> PackedSplit:
        """Return the same split, whose batches are made on ``device``."""
        return replace(self, labels=self.labels.to(device))

    def with_labels(self, labels: Tensor) -> PackedSplit:
        """Return the same images with other ``labels``."""
        return replace(self, labels=labels)

    def mirrored(self) -> PackedSplit:
        """Return the mirror images, left to right, for evaluation."""
        return replace(self, is_mirrored=not self.is_mirrored)

    def sample(self) -> Tensor:
        """Return the evaluated pixels of 2,000 images, drawn with seed 0, or of all if fewer."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return self.take(order[:SAMPLE]).images

    def pixel_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, S, S] and labels [B], in order; B is at most ``batch_size``."""
        if len(self) == 0:
            return
        parts = self.positions.split(min(batch_size, MOST_IN_BATCH))
        labels = self.labels.split(min(batch_size, MOST_IN_BATCH))
        count = min(self.workers, len(parts) - 1)
        workers = Workers(CentreCuts(self.file, self.size), count, self.device, persistent=False)
        cut = workers.results(part.tolist() for part in parts)
        for pixels, part_labels in zip(cut, labels, strict=True):
            pixels = pixels.to(self.device, non_blocking=True)
            yield pixels.flip(3) if self.is_mirrored else pixels, part_labels

    def loader(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: Views = ONE_VIEW,
        strong_copies: bool = False,
        share: Share = WHOLE,
    ) -> PackedLoader:
        """Return a loader whose images are decoded by worker processes."""
        augmenter = CutAugmenter(
            mean,
            std,
            views,
            side=self.size,
            device=self.device,
            strong_copies=strong_copies,
        )
        return PackedLoader(
            self.file,
            self.positions,
            self.labels,
            augmenter,
            workers=self.workers,
            batch_size=batch_size,
            share=share,
        )
