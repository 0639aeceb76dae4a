"""Averages of an epoch's metrics, computed on the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from sskd.errors import UserError, shortened
from sskd.streams import wait_for


class Meter:
    """Sums of metrics over images; only ``read`` and ``first_non_finite`` copy to the host.

    The sums stay in the same tensors, so that a CUDA graph can contain ``add``; ``count`` then
    counts the images on the host.
    """

    def __init__(self) -> None:
        self.images = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._steps = 0  # since the start, or since the last load of finite sums
        self._finite: Tensor | None = None  # for each metric, the number of steps with a finite sum

    def add(self, metrics: Mapping[str, Tensor], images: int) -> None:
        """Add ``metrics``, scalars that are means over ``images`` images, on the device alone.

        Raises:
            UserError: their names differ from those of the first step, or of the checkpoint.
        """
        values = torch.stack([value.detach().float() for value in metrics.values()]) * images
        if self._sums is None or self._finite is None:
            self._names = list(metrics)
            self._sums = torch.zeros_like(values)
            self._finite = torch.zeros_like(values, dtype=torch.long)
        if list(metrics) != self._names:
            raise UserError(
                f"the names of the metrics changed from {shortened(self._names)} to "
                f"{shortened(list(metrics))} between two steps; a method must return the same "
                "names in each step (if the checkpoint was changed, start from scratch with "
                "force=true)"
            )
        self._sums += values
        # A sum never becomes finite again. The product is 0 if it is finite, else NaN.
        self._finite += self._sums.mul(0) == 0

    def count(self, images: int) -> None:
        """Count the ``images`` of a step that was added."""
        self.images += images
        self._steps += 1

    def reset(self) -> None:
        """Start a new average of the same metrics."""
        self.images = self._steps = 0
        for tensor in (self._sums, self._finite):
            if tensor is not None:
                tensor.zero_()

    def read(self) -> dict[str, float]:
        """Return the means over all images so far."""
        if self._sums is None or not self.images:
            return {}
        wait_for(self._sums.device)
        return dict(zip(self._names, (self._sums / self.images).tolist(), strict=True))

    def first_non_finite(self, names: Collection[str]) -> tuple[int, list[str]]:
        """Return how many steps ago the first of ``names`` was not finite, and which it was.

        1 means the last step. If all are finite, return 0 and no name.
        """
        if self._finite is None:
            return 0, []
        before = dict(zip(self._names, self._finite.tolist(), strict=True))
        first = min((before[name] for name in names), default=self._steps)
        first_ones = [name for name in names if before[name] == first < self._steps]
        return self._steps - first, first_ones

    def state_dict(self) -> dict[str, Any]:
        """Return the state that ``load_state_dict`` restores."""
        return {"images": self.images, "names": self._names, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore ``state`` on ``device``.

        Raises:
            ValueError: it is not the state of a meter.
        """
        images, names, sums = state["images"], state["names"], state["sums"]
        if not isinstance(images, int) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{images!r} images, metrics named {names!r}")
        if sums.shape != (len(names),):
            raise ValueError(f"{len(names)} metrics of the shape {tuple(sums.shape)}")
        self.images, self._names, self._sums = images, list(names), sums.to(device)
        self._finite = torch.zeros_like(self._sums, dtype=torch.long)
