"""Labelled images, and the selection of a part of them.

Few-shot training, label noise and a held-out part follow the studies of Xu et al.,
*Knowledge Distillation Meets Self-Supervision*, ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sskd.data.augmentation import ONE_VIEW, Views
from sskd.data.labelled import LabelledImages
from sskd.data.loader import Loader
from sskd.distributed.share import WHOLE, Share
from sskd.errors import UserError
from sskd.seeding import seed_from_text

L = TypeVar("L", bound=LabelledImages)

# The deviation of a constant channel is 0; dividing by this number keeps the pixels finite.
MIN_STD = 1e-6


@dataclass(frozen=True)
class Split:
    """Images in memory: ``images`` uint8 [N, 3, S, S] and ``labels`` int64 [N] on one device."""

    images: Tensor
    labels: Tensor

    has_numbered_crops = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    @property
    def size(self) -> int:
        """Pixels of a side."""
        return self.images.shape[-1]

    def take(self, indices: Tensor) -> Split:
        """Return the images at the positions ``indices`` (int64 [M])."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> Split:
        """Return the same split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def with_labels(self, labels: Tensor) -> Split:
        """Return the same images with other ``labels``."""
        return Split(self.images, labels)

    def mirrored(self) -> Split:
        """Return the mirror images, left to right."""
        return Split(self.images.flip(3), self.labels)

    def sample(self) -> Tensor:
        """Return all images."""
        return self.images

    def pixel_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images [B, 3, S, S] and labels [B], in order; B is at most ``batch_size``."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], self.labels[part]

    def loader(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        views: Views = ONE_VIEW,
        strong_copies: bool = False,
        share: Share = WHOLE,
    ) -> Loader:
        """Return a loader that draws on the device of the images."""
        return Loader(
            self,
            mean,
            std,
            batch_size=batch_size,
            views=views,
            strong_copies=strong_copies,
            share=share,
        )


@dataclass(frozen=True, kw_only=True)
class Images:
    """A dataset ready for training.

    ``mean`` and ``std`` hold one value for each channel, in units of [0, 1]. ``digest`` is the
    digest of the files; None if the content of the source never changes.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    test: LabelledImages
    holdout: LabelledImages | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Pixels on each side."""
        return self.train.size

    def to(self, device: torch.device | str) -> Images:
        """Return the same dataset with all of its tensors on ``device``."""
        holdout = None if self.holdout is None else self.holdout.to(device)
        return replace(
            self, train=self.train.to(device), test=self.test.to(device), holdout=holdout
        )


def hold_out(train: L, classes: tuple[str, ...], part: float, seed: int) -> tuple[L, L | None]:
    """Split ``part`` of each class off ``train``, at least one image; the order is kept.

    Returns:
        The remaining training images, and the held-out images; None if ``part`` is 0.

    Raises:
        UserError: a class would have no training image left.
    """
    if part == 0:
        return train, None
    taken = torch.zeros(len(train), dtype=torch.bool)
    for name, members in zip(
        classes, _shuffle_within_classes(train, len(classes), seed, "holdout"), strict=True
    ):
        count = max(1, round(part * len(members)))
        if count >= len(members):
            raise UserError(
                f"dataset.holdout={part} takes all {len(members)} training images of class "
                f"'{name}'; give a smaller dataset.holdout"
            )
        taken[members[:count]] = True
    return train.take((~taken).nonzero()[:, 0]), train.take(taken.nonzero()[:, 0])


def keep_fraction(train: L, num_classes: int, fraction: float, seed: int) -> L:
    """Keep ``max(1, round(fraction * n))`` of the n images of each class, in their order.

    With the same seed, the images of a smaller fraction are a subset of those of a larger one.
    """
    if fraction == 1:
        return train
    kept = torch.zeros(len(train), dtype=torch.bool)
    for members in _shuffle_within_classes(train, num_classes, seed, "fraction"):
        kept[members[: max(1, round(fraction * len(members)))]] = True
    return train.take(kept.nonzero()[:, 0])


def add_label_noise(train: L, num_classes: int, noise: float, seed: int) -> L:
    """Replace ``round(noise * n)`` of the n labels of each class by another class.

    The other class is drawn uniformly. With the same seed, a smaller noise replaces a subset of
    the labels that a larger one replaces, by the same classes.

    Raises:
        UserError: there is only one class.
    """
    if noise == 0:
        return train
    if num_classes < 2:
        raise UserError(
            f"dataset.label_noise={noise} needs a second class to take wrong labels from, but "
            "the dataset has only one class; set dataset.label_noise=0"
        )
    # A shift by 1 to C - 1 gives each other class the same probability, and never the class itself.
    shift = torch.randint(
        1, num_classes, (len(train),), generator=_generator(seed, "label_noise shift")
    )
    labels = train.labels.clone()
    for members in _shuffle_within_classes(train, num_classes, seed, "label_noise"):
        wrong = members[: round(noise * len(members))]
        labels[wrong] = (labels[wrong] + shift[wrong]) % num_classes
    return train.with_labels(labels)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and the standard deviation of each channel over all pixels.

    ``images`` are uint8 [N, 3, H, W], the results in units of [0, 1]. They are computed from the
    histogram of a channel, so the images are never copied to floating point.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        std = (share * (values - mean).square()).sum().sqrt()
        means.append(mean.item())
        stds.append(max(std.item(), MIN_STD))
    return tuple(means), tuple(stds)


def _shuffle_within_classes(
    train: LabelledImages, num_classes: int, seed: int, purpose: str
) -> list[Tensor]:
    """Return the positions of the images of each class, in random order."""
    generator = _generator(seed, purpose)
    shuffled = []
    for label in range(num_classes):
        members = (train.labels == label).nonzero()[:, 0]
        shuffled.append(members[torch.randperm(len(members), generator=generator)])
    return shuffled


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Return a CPU generator for ``purpose``, so that selections are independent of each other."""
    return torch.Generator().manual_seed(seed_from_text(f"{purpose} {seed}"))
