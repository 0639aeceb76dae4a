"""A line of ``metrics.jsonl``: the metrics of one epoch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from sskd.errors import shortened
from sskd.runs import fields
from sskd.runs.names import MOST_EPOCHS


@dataclass(frozen=True)
class EpochLine:
    """One finished epoch of a run.

    Attributes:
        phase: the phase's name; the file has it under the key ``stage``, as every version.
        epoch: the number of the epoch in its phase, from 1.
        metrics: finite numbers by name: the learning rate, losses, accuracies in percent,
            ``images_per_second`` and ``seconds`` without evaluation.
        date: the end of the epoch; None if it was not recorded.
    """

    phase: str
    epoch: int
    metrics: Mapping[str, float]
    date: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        date = {} if self.date is None else {"date": self.date.isoformat(timespec="seconds")}
        return {"stage": self.phase, "epoch": self.epoch, **self.metrics, **date}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the epoch with these fields, without those that are not finite numbers.

        Raises:
            ValueError: the phase or the epoch is missing or malformed.
        """
        phase, epoch = fields.text(values, "stage"), fields.integer(values, "epoch")
        if epoch > MOST_EPOCHS:
            raise ValueError(f"'epoch' is {shortened(epoch)}, out of range")
        numbers = {
            key: value
            for key, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
            # This also leaves out NaN and infinity.
            if key != "epoch" and key.isprintable() and abs(value) <= sys.float_info.max
        }
        return cls(phase, epoch, numbers, fields.timestamp(values, "date"))
