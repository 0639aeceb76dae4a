"""Averages of an epoch's figures, kept on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums of figures over images; only ``read`` and ``first_lost`` copy to the host."""

    def __init__(self) -> None:
        self.images = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._steps = 0  # since the start, or since what was loaded, which was finite
        self._finite: Tensor | None = None  # for each figure, the steps before it was lost

    def add(self, figures: Mapping[str, Tensor], images: int) -> None:
        """Add ``figures``, scalars that are means over ``images`` images."""
        values = torch.stack([value.detach().float() for value in figures.values()]) * images
        self._names = list(figures)
        self._sums = values if self._sums is None else self._sums + values
        self.images += images
        finite = self._sums.isfinite().long()  # a sum that is lost stays lost
        self._finite = finite if self._finite is None else self._finite + finite
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return the means over all images so far."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self.images).tolist(), strict=True))

    def first_lost(self, names: Collection[str]) -> tuple[int, list[str]]:
        """Return how many steps ago the first of the figures ``names`` was not finite, and which.

        1 is the last step; it is 0, and none, if all are finite.
        """
        if self._finite is None:
            return 0, []
        before = dict(zip(self._names, self._finite.tolist(), strict=True))
        first = min((before[name] for name in names), default=self._steps)
        lost = [name for name in names if before[name] == first < self._steps]
        return self._steps - first, lost

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` goes on from."""
        return {"images": self.images, "names": self._names, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from ``state`` on ``device``.

        Raises:
            ValueError: it is no meter's.
        """
        images, names, sums = state["images"], state["names"], state["sums"]
        if not isinstance(images, int) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{images!r} images, figures called {names!r}")
        if sums.shape != (len(names),):
            raise ValueError(f"{len(names)} figures of the shape {tuple(sums.shape)}")
        self.images, self._names, self._sums = images, list(names), sums.to(device)
