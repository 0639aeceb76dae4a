"""What is made of the cut views of a batch on its device: strong and transformed ones.

The random choices (``draw_choices``) are separate from the pixels (``ViewMaker``), so that they can
be drawn in other processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sskd.data.augmentation import Normaliser, Views
from sskd.data.strong import StrongAugmentation, StrongView, draw_strong
from sskd.data.transformations import Transformations, TransformedView


class Drawing(NamedTuple):
    """What the choices are drawn for: ``views`` of samples of ``side`` pixels."""

    views: Views
    side: int
    strong_copies: bool

    @property
    def cuts(self) -> int:
        """Crops that are drawn for each sample."""
        return self.views.drawn_crops * (2 if self.views.strong else 1)

    @property
    def strong(self) -> StrongAugmentation | None:
        """The settings of the strong views, if there are some."""
        return StrongAugmentation() if self.strong_copies else self.views.strong


class Choices(NamedTuple):
    """The random choices for samples, beside their crops; None if there are no such views.

    ``strong``, int32 [samples, k, P], is what ``draw_strong`` draws for each strong view, or for
    the one crop of all views. ``transformed``, float32 [samples, k, P], is what ``TransformedView``
    draws.
    """

    strong: Tensor | None
    transformed: Tensor | None

    def of(self, samples: Tensor) -> Choices:
        """Return those of ``samples`` [B]."""
        return Choices(*(None if each is None else each.index_select(0, samples) for each in self))


def draw_choices(samples: int, drawing: Drawing, generator: torch.Generator) -> Choices:
    """Draw the choices for ``samples``, on the CPU as ``generator``."""
    strong = transformed = None
    views, side = drawing.views, drawing.side
    if settings := drawing.strong:
        drawn = draw_strong(samples * views.drawn_crops, side, settings, generator)
        strong = drawn.unflatten(0, (samples, views.drawn_crops))
    if views.transformed:
        view = _drawer(views.transformed, side)
        drawn = view.draw(samples * views.transformed.views, generator)
        transformed = drawn.unflatten(0, (samples, views.transformed.views))
    return Choices(strong, transformed)


@cache  # a worker process draws for one sample at a time
def _drawer(settings: Transformations, side: int) -> TransformedView:
    return TransformedView(settings, side, torch.device("cpu"))


class ViewMaker:
    """Makes the images [views * B, 3, S, S] of samples from the cut ones, on ``device``.

    Attributes:
        drawing: what its choices are drawn for.
        normalise: the last step; alone, it is for images without strong or transformed views.
    """

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
        if strong_copies and views.strong:
            raise ValueError("the views have strong copies already")
        self.drawing = Drawing(views, side, strong_copies)
        self.normalise = Normaliser(mean, std, width=side, device=device)
        if self.drawing.strong:
            self._make_strong = StrongView(side, device)
        if views.transformed:
            self._transform = TransformedView(views.transformed, side, device)

    def __call__(self, cut: Tensor, choices: Choices, *, is_copy: Tensor | None) -> Tensor:
        """Return the normalised views of B samples.

        Args:
            cut: uint8 [views * B, 3, S, S]; its row ``i * views + v`` is view v of sample i.
            choices: of these samples.
            is_copy: whether each sample is a strong copy, bool [B]; None without copies.
        """
        if choices.strong is None and choices.transformed is None:
            return self.normalise(cut)
        views = cut.unflatten(0, (-1, self.drawing.views.count))
        if choices.strong is not None:
            views = self._with_strong(views, choices.strong, is_copy)
        if choices.transformed is not None:
            views = self._with_transformed(views, choices.transformed)
        return self.normalise(views.flatten(0, 1))

    def _with_strong(self, cut: Tensor, parameters: Tensor, is_copy: Tensor | None) -> Tensor:
        """Return the views of samples; ``cut`` [B, views, 3, S, S] are their crops."""
        crops = self.drawing.views.crops
        weak, strong = cut[:, :crops], cut[:, -crops:]
        made = self._strong(strong, parameters)
        if is_copy is None:
            return torch.cat([weak, made], dim=1)
        return torch.where(is_copy.view(-1, 1, 1, 1, 1), made, weak)

    def _with_transformed(self, views: Tensor, parameters: Tensor) -> Tensor:
        """Transform all of the ``views`` [B, k, 3, S, S] but the first of each sample."""
        made = self._transform(views[:, 1:].flatten(0, 1), parameters.flatten(0, 1))
        return torch.cat([views[:, :1], made.unflatten(0, parameters.shape[:2])], dim=1)

    def _strong(self, views: Tensor, parameters: Tensor) -> Tensor:
        """Make ``views`` [B, k, 3, S, S] strong; those of one crop are rotated afterwards."""
        settings = self.drawing.views
        drawn = views[:, : settings.drawn_crops].flatten(0, 1)
        made = self._make_strong(drawn, parameters.flatten(0, 1))
        made = made.unflatten(0, (-1, settings.drawn_crops))
        if not settings.one_crop:
            return made
        turns = [torch.rot90(made[:, 0], turn, (2, 3)) for turn in range(settings.rotations)]
        return torch.stack(turns, dim=1)
