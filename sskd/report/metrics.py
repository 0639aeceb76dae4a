"""Read the ``metrics.jsonl`` of runs, a line an epoch, and average it over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sskd.errors import shortened
from sskd.files import is_regular_file, read_lines
from sskd.report import fields
from sskd.runs.names import METRICS, MOST_EPOCHS, MOST_METRICS

TEST_TOP1 = "test/top1"
LOSS, WEIGHTED = "loss/", "weighted/"
LARGEST = 1e30
# Names in all lines of a run, which writes some twenty: a curve is drawn for each loss.
MOST_FIGURES = 200


@dataclass(frozen=True)
class EpochLine:
    """One epoch: its stage, its number within that, from 1, its finite figures and its end."""

    stage: str
    epoch: int
    figures: dict[str, float]
    date: datetime | None


@dataclass(frozen=True)
class Curve:
    """A figure against the epoch, over seeds: means, and deviations (0 for a single run)."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_metrics(folder: Path, warn: Callable[[str], None]) -> list[EpochLine]:
    """Return the epochs of the run in ``folder``, in order; none where nothing was written.

    Malformed lines, and those that bring more than ``MOST_FIGURES``, are skipped and reported once
    through ``warn``.
    """
    path = folder / METRICS
    if not is_regular_file(path):
        return []
    epochs, damaged = [], 0
    names: set[str] = set()
    try:
        for line in read_lines(path, MOST_METRICS, MOST_EPOCHS):
            try:
                epoch = _parse_line(line.decode())
                names = _refuse_many(names | epoch.figures.keys())
                epochs.append(epoch)
            except ValueError:
                damaged += 1
    except (OSError, ValueError) as error:
        warn(f"{path}: {error}; left out")
        return []
    if damaged:
        total = len(epochs) + damaged
        warn(f"{path}: {damaged} of {total} lines are no epoch's figures; left out")
    return epochs


def top1_curve(runs: Iterable[list[EpochLine]]) -> Curve:
    """Return the top-1 on the test set, in percent, by epoch of the stage that is evaluated."""
    return _average(
        {
            line.epoch: line.figures[TEST_TOP1]
            for line in lines
            if 0 <= line.figures.get(TEST_TOP1, -1) <= 100
        }
        for lines in runs
    )


def loss_curves(runs: list[list[EpochLine]], prefix: str) -> dict[str, Curve]:
    """Return each loss term's mean by epoch, counted through all stages in the order of the run.

    ``prefix`` is ``loss/`` or ``weighted/``; the keys are the terms without it.
    """
    names = (name for lines in runs for line in lines for name in line.figures)
    terms = dict.fromkeys(name for name in names if name.startswith(prefix))
    return {
        term.removeprefix(prefix): _average(
            {
                number: line.figures[term]
                for number, line in enumerate(lines, start=1)
                if term in line.figures
            }
            for lines in runs
        )
        for term in terms
    }


def _refuse_many(names: set[str]) -> set[str]:
    if len(names) > MOST_FIGURES:
        raise ValueError(f"it has more than {MOST_FIGURES} figures")
    return names


def _parse_line(text: str) -> EpochLine:
    record = fields.parse_object(text)
    figures = {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        # False for NaN and infinity too; what is larger breaks the scale of a plot.
        if abs(value) < LARGEST and key.isprintable()
    }
    epoch = fields.integer(record, "epoch")
    if epoch > MOST_EPOCHS:
        raise ValueError(f"'epoch' is {shortened(epoch)}, out of range")
    return EpochLine(fields.text(record, "stage"), epoch, figures, fields.timestamp(record, "date"))


def _average(runs: Iterable[dict[int, float]]) -> Curve:
    values: dict[int, list[float]] = {}
    for by_epoch in runs:
        for epoch, value in by_epoch.items():
            values.setdefault(epoch, []).append(value)
    epochs = tuple(sorted(values))
    return Curve(
        epochs,
        mean=tuple(statistics.fmean(values[epoch]) for epoch in epochs),
        std=tuple(
            statistics.stdev(values[epoch]) if len(values[epoch]) > 1 else 0.0 for epoch in epochs
        ),
    )
