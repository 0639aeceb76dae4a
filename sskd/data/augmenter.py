"""The views of all samples of an epoch: drawn at its start, made batch by batch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sskd.data.augmentation import Cropper, Views, draw_crops
from sskd.data.view_maker import Choices, ViewMaker, draw_choices
from sskd.turns import shared


class Augmenter:
    """Makes the ``views`` of samples of ``images``, uint8 [N, 3, S, S], on their device.

    A sample is an image. With ``strong_copies``, samples N to 2N - 1 are copies of the images, all
    of whose views are strong.

    Attributes:
        samples: in an epoch.
        crops: of each sample, int64 [samples, views]; see ``draw_crops``.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        views: Views,
        *,
        strong_copies: bool,
    ) -> None:
        device, side = images.device, images.shape[-1]
        self._images, self._views, self._has_copies = len(images), views, strong_copies
        self.samples = len(images) * (2 if strong_copies else 1)
        rotations, jigsaws = views.rotations, views.jigsaws > 0
        self._crop = shared(
            ("crops", id(images), rotations, jigsaws),
            lambda: Cropper(images, rotations, jigsaws=jigsaws),
        )
        self._make = ViewMaker(
            mean, std, views, side=side, device=device, strong_copies=strong_copies
        )
        self.crops = torch.empty(self.samples, views.count, dtype=torch.int64, device=device)
        self._strong, self._transformed = (
            None if one is None else one.new_empty(self.samples, *one.shape[1:], device=device)
            for one in draw_choices(1, self._make.drawing, torch.Generator())
        )

    def begin_epoch(self, generator: torch.Generator) -> None:
        """Draw the views of all samples."""
        self.crops.copy_(draw_crops(self.samples, self._views, generator))
        choices = draw_choices(self.samples, self._make.drawing, generator)
        for kept, drawn in zip((self._strong, self._transformed), choices, strict=True):
            if kept is not None and drawn is not None:
                kept.copy_(drawn)

    def views_of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images [views * B, 3, S, S] and the crops [B, views] of ``samples`` [B]."""
        crops = self.crops.index_select(0, samples)
        cut = self._crop(samples % self._images, crops)
        choices = Choices(self._strong, self._transformed).of(samples)
        is_copy = samples >= self._images if self._has_copies else None
        return self._make(cut, choices, is_copy=is_copy), crops

    def crops_of(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Return the ``crops`` [B, k] of the images ``indices`` [B]: float32 [B * k, 3, S, S].

        They are normalised, and neither strong nor transformed.
        """
        return self._make.normalise(self._crop(indices, crops))
