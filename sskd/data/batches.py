"""Batches, and the place of a loader in an epoch, wherever the images are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor

from sskd.data.augmentation import Views
from sskd.distributed.share import Share


class Batch(NamedTuple):
    """The images of one training step.

    ``x`` is float32 [views * B, 3, H, W], normalised, channels last in memory. Its row
    ``i * views + v`` is view v of image i. ``y`` is int64 [B]. ``indices``, int64 [B], are the
    positions of the images in the training split. ``crops``, int64 [views * B], is the number of
    the crop in each row of ``x`` (see ``draw_crops`` and ``draw_arrangements``).
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    crops: Tensor


class LoaderState(TypedDict):
    """The state of a loader: the epoch's seed, and the batches drawn."""

    seed: int
    position: int


class EpochLoader(ABC):
    """Shuffled and augmented batches of the ``samples`` of an epoch.

    ``batch_size`` is that of all processes together; each draws its ``share`` of every batch. The
    seed of an epoch determines all of its batches. A new loader is at the start of an epoch with
    seed 0.

    Attributes:
        draws_on_device: ``draw`` works on the device alone, on tensors that stay in place. So a
            CUDA graph can contain it.
        augmenter: makes the views.
    """

    draws_on_device: ClassVar[bool]
    augmenter: object

    def __init__(
        self, device: torch.device, *, samples: int, batch_size: int, views: Views, share: Share
    ) -> None:
        self.device, self.samples = device, samples
        self.batch_size, self.share, self.views = batch_size, share, views
        self._seed = self._position = 0

    @property
    def steps(self) -> int:
        """Batches in an epoch, including the last one, which may be smaller."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (self.share.size(rest) > 0)

    @property
    def position(self) -> int:
        """Batches drawn in this epoch."""
        return self._position

    @property
    def next_size(self) -> int:
        """Images in this process's share of the next batch; 0 at the end of the epoch."""
        return self._place(self._position)[1]

    def _place(self, position: int) -> tuple[int, int]:
        """Return this process's share of a batch: its start in the epoch's order, and its size."""
        start = position * self.batch_size
        batch = min(self.batch_size, max(self.samples - start, 0))  # of all processes
        return start + self.share.start(batch), self.share.size(batch)

    @abstractmethod
    def begin_epoch(self, seed: int) -> None:
        """Draw the order and the views of an epoch."""

    @abstractmethod
    def views_of(self, samples: Tensor) -> Tensor:
        """Return the images [views * B, 3, S, S] of ``samples`` [B] of the epoch."""

    @abstractmethod
    def draw(self, size: int) -> Batch:
        """Draw ``size`` images of the next batch; ``advance`` follows."""

    @abstractmethod
    def peek(self, size: int) -> Batch:
        """Return what ``draw`` will return."""

    def next_batch(self) -> Batch:
        """Draw the next batch of the epoch. Raises IndexError after the last one."""
        if self._position >= self.steps:
            raise IndexError(f"all {self.steps} batches of the epoch are drawn")
        batch = self.draw(self.next_size)
        self.advance()
        return batch

    def advance(self) -> None:
        """Count a batch that was drawn."""
        self._position += 1

    def close(self) -> None:  # noqa: B027
        """End the processes that prepare batches, if there are some; nothing is drawn after it."""

    def state_dict(self) -> LoaderState:
        """Return everything that is needed to resume in the middle of an epoch."""
        return {"seed": self._seed, "position": self._position}

    def load_state_dict(self, state: LoaderState) -> None:
        """Resume at ``state``: bit for bit, if this version saved it.

        Raises:
            ValueError: the position is not in this epoch, because the data were different; or an
                earlier version drew the order of the epoch on a GPU.
        """
        if not isinstance(state["position"], int) or not 0 <= state["position"] <= self.steps:
            raise ValueError(f"step {state['position']} of {self.steps}")
        if "generator" in state and self.device.type != "cpu":
            # On a CPU that version drew the same order. Only the crops of the rest are others.
            raise ValueError("an earlier version drew the order of the epoch's images on the GPU")
        self.begin_epoch(state["seed"])
        self._move_to(state["position"])

    def _move_to(self, position: int) -> None:
        self._position = position
