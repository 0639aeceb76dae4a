"""What every split of a dataset offers, whether its images are in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from sskd.data.augmentation import ONE_VIEW, Views
from sskd.data.batches import EpochLoader
from sskd.distributed.share import WHOLE, Share


class LabelledImages(Protocol):
    """Square images of one size with their labels."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on ``device``."""

    @property
    def device(self) -> torch.device:
        """Where batches are made."""

    @property
    def size(self) -> int:
        """Pixels of a side."""

    @property
    def images(self) -> Tensor:
        """All images as they are evaluated, uint8 [N, 3, S, S] on ``device``.

        Images in a file are all decoded for it: ``take`` a few of them first.
        """

    @property
    def has_numbered_crops(self) -> bool:
        """Whether each view has one of a few crops, as ``draw_crops`` numbers them."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Self:
        """Return the images at the positions ``indices`` (int64 [M])."""

    def to(self, device: torch.device | str) -> Self:
        """Return the same split on ``device``."""

    def with_labels(self, labels: Tensor) -> Self:
        """Return the same images with other ``labels``."""

    def mirrored(self) -> Self:
        """Return the mirror images, left to right, for evaluation."""

    def sample(self) -> Tensor:
        """Return the images of which a mean and a standard deviation are computed, as ``images``.

        They are all images, or a seeded choice of images in a file.
        """

    def pixel_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images uint8 [B, 3, S, S] and labels [B], in order and without augmentation.

        B is at most ``batch_size``.
        """

    def loader(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: Views = ONE_VIEW,
        strong_copies: bool = False,
        share: Share = WHOLE,
    ) -> EpochLoader:
        """Return a loader of shuffled and augmented batches; the arguments are as of ``Loader``."""
