"""Read a run's ``metrics.jsonl``, one line an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sskd.files import is_regular_file, read_lines
from sskd.runs import fields
from sskd.runs.epoch_line import EpochLine
from sskd.runs.names import METRICS, MOST_EPOCHS, MOST_METRICS

LARGEST = 1e30  # a larger value breaks the scale of a plot
# Names of metrics in all lines of a run, which has some twenty. Each loss gets a curve.
MOST_NAMES = 200


def read_metrics(folder: Path, warn: Callable[[str], None]) -> list[EpochLine]:
    """Return the epochs of the run in ``folder``, in order; an empty list without the file.

    Malformed lines, and lines that exceed ``MOST_NAMES``, are skipped and reported once through
    ``warn``.
    """
    path = folder / METRICS
    if not is_regular_file(path):
        return []
    epochs, malformed = [], 0
    names: set[str] = set()
    try:
        for line in read_lines(path, MOST_METRICS, MOST_EPOCHS):
            try:
                epoch = _parse_line(line.decode())
                names = _refuse_many(names | epoch.metrics.keys())
                epochs.append(epoch)
            except ValueError:
                malformed += 1
    except (OSError, ValueError) as error:
        warn(f"{path}: {error}; left out")
        return []
    if malformed:
        total = len(epochs) + malformed
        warn(f"{path}: {malformed} of {total} lines are malformed; left out")
    return epochs


def _refuse_many(names: set[str]) -> set[str]:
    if len(names) > MOST_NAMES:
        raise ValueError(f"it has more than {MOST_NAMES} names of metrics")
    return names


def _parse_line(text: str) -> EpochLine:
    line = EpochLine.from_json(fields.parse_object(text))
    shown = {name: value for name, value in line.metrics.items() if abs(value) < LARGEST}
    return replace(line, metrics=shown)
