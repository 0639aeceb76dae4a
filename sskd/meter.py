"""Averages of an epoch's figures, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Sums of figures over images; ``read`` makes the only copy to the host."""

    def __init__(self) -> None:
        self.images = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, figures: Mapping[str, Tensor], images: int) -> None:
        """Add ``figures``, scalars that are means over ``images`` images."""
        values = torch.stack([value.detach().float() for value in figures.values()]) * images
        self._names = list(figures)
        self._sums = values if self._sums is None else self._sums + values
        self.images += images

    def read(self) -> dict[str, float]:
        """Return the means over all images so far."""
        if self._sums is None:
            return {}
        return dict(zip(self._names, (self._sums / self.images).tolist(), strict=True))

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
