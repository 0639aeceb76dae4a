"""Stepwise learning-rate schedules. Milestones are shares of the epochs, so they scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field

from sskd.settings import EARLY, LATE, LearningRate, Multiple, Settings, Share

# At most 30, so that a learning rate times gamma^30 is still finite.
Milestones = Annotated[list[Share], Field(max_length=30)]
Gamma = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False), EARLY, LATE]


class PhaseSettings(Settings):
    """The schedule of a phase that has its own, in relation to the run's.

    ``lr`` None is the run's. ``epochs`` is a multiple of the run's epochs; at least one epoch is
    trained. ``milestones`` are shares of the phase's epochs.
    """

    lr: LearningRate | None
    epochs: Multiple
    milestones: Milestones


@dataclass(frozen=True)
class Schedule:
    """``epochs`` at ``lr``, multiplied by ``gamma`` after each of the ``milestones`` (epochs)."""

    epochs: int
    lr: float
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    @classmethod
    def from_shares(cls, epochs: int, lr: float, milestones: Sequence[float], gamma: float) -> Self:
        """Return the schedule whose milestones are shares of ``epochs``, rounded half up."""
        after = tuple(math.floor(share * epochs + 0.5) for share in milestones)
        return cls(epochs, lr, after, gamma)

    def phase(self, settings: PhaseSettings) -> Schedule:
        """Return the schedule of a phase with ``settings`` in a run with this schedule."""
        epochs = max(1, math.floor(settings.epochs * self.epochs + 0.5))
        lr = self.lr if settings.lr is None else settings.lr
        return self.from_shares(epochs, lr, settings.milestones, self.gamma)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``, counted from 0."""
        return self.lr * self.gamma ** sum(milestone <= epoch for milestone in self.milestones)
