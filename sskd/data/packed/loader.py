"""Batches of packed images: cut by worker processes, made into views on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sskd.data.augmentation import CROPS, Views, jigsaw_positions
from sskd.data.batches import Batch, EpochLoader
from sskd.data.packed.cutting import Cuts, TrainingCuts, TrainingRequest
from sskd.data.packed.file import PackedFile
from sskd.data.packed.workers import Workers
from sskd.data.view_maker import Choices, ViewMaker
from sskd.distributed.share import Share

HALF = CROPS // 2  # the crops that are not flipped


class CutAugmenter:
    """Makes the views of samples out of what the worker processes cut, on the device."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        views: Views,
        *,
        side: int,
        device: torch.device,
        strong_copies: bool,
    ) -> None:
        self._views, self._has_copies = views, strong_copies
        self._make = ViewMaker(
            mean, std, views, side=side, device=device, strong_copies=strong_copies
        )
        self.drawing = self._make.drawing
        if views.jigsaws:
            self._patches = jigsaw_positions(side).to(device)

    def views_of(self, cuts: Cuts, is_copy: Tensor) -> Tensor:
        """Return the images [views * B, 3, S, S] of ``cuts``, which are on the device.

        ``is_copy``, bool [B], is whether each sample is a strong copy.
        """
        arranged = self._arranged(cuts.pixels, cuts.arrangements)
        choices = Choices(cuts.strong, cuts.transformed)
        return self._make(
            arranged.flatten(0, 1), choices, is_copy=is_copy if self._has_copies else None
        )

    def _arranged(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """Flip and rotate the cuts [B, k, 3, S, S], and order their patches: [B, views, ...]."""
        views = self._views
        if views.one_crop:
            pixels = pixels.repeat_interleave(views.crops, dim=1)
        is_flipped = (numbers % CROPS >= HALF).view(*numbers.shape, 1, 1, 1)
        flipped = torch.where(is_flipped, pixels.flip(-1), pixels)
        if views.rotations > 1:
            turns = [view % views.crops for view in range(views.count)]
            columns = zip(flipped.unbind(1), turns, strict=True)
            return torch.stack([torch.rot90(column, turn, (2, 3)) for column, turn in columns], 1)
        if views.jigsaws:
            sources = self._patches[numbers // CROPS].unsqueeze(2)
            flat = flipped.flatten(3)
            return flat.gather(3, sources.expand_as(flat)).view(flipped.shape)
        return flipped


class PackedLoader(EpochLoader):
    """Shuffled and augmented batches of the images at ``positions`` of a packed file.

    Worker processes decode the images ahead and cut them at random (``TrainingCuts``). Everything
    else is done on the device of the ``labels``, as by ``Loader``. The order of an epoch is that of
    ``Loader`` with the same seed.
    """

    draws_on_device = False
    augmenter: CutAugmenter

    def __init__(
        self,
        file: PackedFile,
        positions: Tensor,
        labels: Tensor,
        augmenter: CutAugmenter,
        *,
        workers: int,
        batch_size: int,
        share: Share,
    ) -> None:
        drawing = augmenter.drawing
        samples = len(labels) * (2 if drawing.strong_copies else 1)
        super().__init__(
            labels.device,
            samples=samples,
            batch_size=batch_size,
            views=drawing.views,
            share=share,
        )
        self.augmenter, self._labels = augmenter, labels
        self._cuts: Iterator[Cuts] | None = None  # the rest of the epoch
        self._fetched: Batch | None = None  # the next batch, after a peek
        self._work = TrainingCuts(file, positions, drawing)
        self._workers = Workers(self._work, workers, self.device)
        self.begin_epoch(0)

    def begin_epoch(self, seed: int) -> None:
        """Draw the order of an epoch; the workers start when the first batch is drawn."""
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(self.samples, generator=generator)
        self._seed = seed
        self._move_to(0)

    def views_of(self, samples: Tensor) -> Tensor:
        """Return the images [views * B, 3, S, S] of ``samples`` [B] of the epoch.

        They are decoded in this process.
        """
        alone = Workers(self._work, 0, self.device)
        (cuts,) = alone.results([TrainingRequest(self._seed, samples.tolist())])
        return self._batch(samples.cpu(), cuts).x

    def draw(self, size: int) -> Batch:
        """Return the next batch, whose share has ``size`` images; ``advance`` follows."""
        batch = self.peek(size)
        self._fetched = None
        return batch

    def peek(self, size: int) -> Batch:
        """Return what ``draw`` will return."""
        if size != self.next_size:
            raise ValueError(f"the next batch has {self.next_size} images, not {size}")
        if self._fetched is None:
            self._cuts = self._cuts or self._workers.results(self._rest())
            self._fetched = self._batch(self._next_samples(), next(self._cuts))
        return self._fetched

    def close(self) -> None:
        """End the worker processes; nothing is drawn after it."""
        self._workers.close()

    def _batch(self, samples: Tensor, cuts: Cuts) -> Batch:
        samples = samples.to(self.device)
        cuts = cuts.to(self.device)
        x = self.augmenter.views_of(cuts, samples >= len(self._labels))
        indices = samples % len(self._labels)
        labels = self._labels.index_select(0, indices)
        return Batch(x, labels, indices, cuts.arrangements.flatten())

    def _rest(self) -> Iterator[TrainingRequest]:
        """Return the requests of this process for the rest of the epoch."""
        places = [self._place(position) for position in range(self._position, self.steps)]
        # They do not refer to this object, which is thus freed with its workers at once.
        order, seed = self._order, self._seed
        parts = (order[start : start + size].tolist() for start, size in places)
        return (TrainingRequest(seed, part) for part in parts)

    def _next_samples(self) -> Tensor:
        start, size = self._place(self._position)
        return self._order[start : start + size]

    def _move_to(self, position: int) -> None:
        super()._move_to(position)
        self._cuts = self._fetched = None
