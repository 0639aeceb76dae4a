"""The views of all samples of an epoch: drawn at its start, made batch by batch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sskd.data.augmentation import Cropper, Normaliser, Views, draw_crops
from sskd.data.strong import StrongAugmentation, StrongView, draw_strong
from sskd.data.transformations import TransformedView
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
        if strong_copies and views.strong:
            raise ValueError("the views have strong copies already")
        device, side = images.device, images.shape[-1]
        self._images, self._side, self._views = len(images), side, views
        self.samples = len(images) * (2 if strong_copies else 1)
        rotations, jigsaws = views.rotations, views.jigsaws > 0
        self._crop = shared(
            ("crops", id(images), rotations, jigsaws),
            lambda: Cropper(images, rotations, jigsaws=jigsaws),
        )
        self._normalise = Normaliser(mean, std, width=side, device=device)
        self.crops = torch.empty(self.samples, views.count, dtype=torch.int64, device=device)
        self._strong_copies = strong_copies
        # Strong views that are drawn on their own.
        self._drawn = 1 if views.one_crop else views.crops
        self._settings = StrongAugmentation() if strong_copies else views.strong
        if self._settings:
            self._make_strong = StrongView(side, device)
            one = draw_strong(1, side, self._settings, torch.Generator())
            shape = (self.samples, self._drawn, one.shape[1])
            self._parameters = torch.empty(shape, dtype=one.dtype, device=device)
        if views.transformed:
            self._transform = TransformedView(views.transformed, side, device)
            one = self._transform.draw(1, torch.Generator())
            shape = (self.samples, views.transformed.views, one.shape[1])
            self._transformations = torch.empty(shape, dtype=one.dtype, device=device)

    def begin_epoch(self, generator: torch.Generator) -> None:
        """Draw the views of all samples."""
        self.crops.copy_(draw_crops(self.samples, self._views, generator))
        if self._settings:
            self._parameters.copy_(self._draw_parameters(generator))
        if self._views.transformed:
            count, views = self._transformations.shape[:2]
            drawn = self._transform.draw(count * views, generator)
            self._transformations.copy_(drawn.view(self._transformations.shape))

    def views_of(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images [views * B, 3, S, S] and the crops [B, views] of ``samples`` [B]."""
        crops = self.crops.index_select(0, samples)
        if not (self._settings or self._views.transformed):
            return self.crops_of(samples, crops), crops
        views = self._crop(samples % self._images, crops).unflatten(0, crops.shape)
        if self._settings:
            views = self._with_strong(views, samples)
        if self._views.transformed:
            views = self._with_transformed(views, samples)
        return self._normalise(views.flatten(0, 1)), crops

    def crops_of(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Return the given ``crops`` [B, k] of the images ``indices`` [B], as they are cut."""
        return self._normalise(self._crop(indices, crops))

    def _with_strong(self, cut: Tensor, samples: Tensor) -> Tensor:
        """Return the views of ``samples`` [B]; ``cut`` [B, views, 3, S, S] are their crops."""
        weak, strong = cut[:, : self._views.crops], cut[:, -self._views.crops :]
        made = self._strong(strong, self._parameters.index_select(0, samples))
        if not self._strong_copies:
            return torch.cat([weak, made], dim=1)
        is_strong = (samples >= self._images).view(-1, 1, 1, 1, 1)
        return torch.where(is_strong, made, weak)

    def _with_transformed(self, views: Tensor, samples: Tensor) -> Tensor:
        """Transform all of the ``views`` [B, k, 3, S, S] of ``samples`` [B] but the first."""
        parameters = self._transformations.index_select(0, samples)
        made = self._transform(views[:, 1:].flatten(0, 1), parameters.flatten(0, 1))
        return torch.cat([views[:, :1], made.unflatten(0, parameters.shape[:2])], dim=1)

    def _draw_parameters(self, generator: torch.Generator) -> Tensor:
        """Draw those of each strong view, or of the one crop of all views: [samples, views, P]."""
        assert self._settings
        drawn = draw_strong(self.samples * self._drawn, self._side, self._settings, generator)
        return drawn.unflatten(0, (self.samples, self._drawn))

    def _strong(self, views: Tensor, parameters: Tensor) -> Tensor:
        """Make ``views`` [B, k, 3, S, S] strong; those of one crop are rotated afterwards."""
        drawn = views[:, : self._drawn].flatten(0, 1)
        made = self._make_strong(drawn, parameters.flatten(0, 1)).unflatten(0, (-1, self._drawn))
        if not self._views.one_crop:
            return made
        turns = [torch.rot90(made[:, 0], turn, (2, 3)) for turn in range(self._views.rotations)]
        return torch.stack(turns, dim=1)
