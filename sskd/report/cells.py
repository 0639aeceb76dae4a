"""What each cell of a sweep is doing: its folder's ``status.json``, trusting nothing in it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from sskd.errors import mask_unprintable, shortened
from sskd.files import is_regular_file, read_bounded_text
from sskd.report import fields
from sskd.report.metrics import EpochLine, read_metrics
from sskd.report.results import find_files
from sskd.runs.lock import is_held
from sskd.runs.names import LAST, MOST_EPOCHS, RESULT
from sskd.runs.status import MOST, STATUS

# In the order of the lists; interrupted is told here only: running, by a process that has died.
STATES = ("running", "queued", "stopped", "interrupted", "failed", "finished")


@dataclass(frozen=True)
class Cell:
    """One run's folder, relative to the folder of runs, and what is known of its progress.

    ``done`` and ``total`` count the epochs of all stages, ``rate`` is in images a second,
    ``seconds_left`` is an estimate for what is running; None is what is not known.
    """

    folder: Path
    state: str
    since: datetime | None = None
    host: str | None = None
    error: str | None = None
    command: str | None = None
    done: int = 0
    total: int | None = None
    rate: float | None = None
    seconds_left: float | None = None

    @property
    def name(self) -> str:
        """The folder as people read it."""
        return mask_unprintable(str(self.folder))


def read_cells(root: Path, warn: Callable[[str], None]) -> list[Cell]:
    """Return the cells under ``root``, by state and then by path.

    A folder without a status counts as finished where there is a result, and as stopped where
    there is a checkpoint. A damaged status is told to ``warn`` and taken for none.
    """
    names = (STATUS, RESULT, LAST)
    folders = dict.fromkeys(path.parent for path in find_files(root, names, warn))
    cells = [cell for folder in folders for cell in _read_cell(folder, root, warn)]
    return sorted(cells, key=lambda cell: STATES.index(cell.state))


def _read_cell(folder: Path, root: Path, warn: Callable[[str], None]) -> Iterator[Cell]:
    name = folder.relative_to(root)
    if is_regular_file(folder / RESULT):
        yield Cell(name, "finished")
        return
    status = _read_status(folder, warn)
    if not status and not is_regular_file(folder / LAST):
        return
    state = str(status.get("state", "stopped"))
    if state == "running" and not is_held(folder):
        state = "interrupted"
    lines = read_metrics(folder, warn)
    epochs = _epochs(status)
    done = _done(lines, epochs)
    yield Cell(
        name,
        state,
        since=fields.timestamp(status, "since"),
        host=fields.optional_text(status, "host"),
        error=fields.optional_text(status, "error") if state == "failed" else None,
        command=fields.optional_text(status, "command"),
        done=done,
        total=sum(epochs.values()) or None,
        rate=lines[-1].figures.get("images_per_second") if lines else None,
        seconds_left=_seconds_left(lines, sum(epochs.values()) - done)
        if state == "running"
        else None,
    )


def _read_status(folder: Path, warn: Callable[[str], None]) -> fields.Record:
    path = folder / STATUS
    if not is_regular_file(path):
        return {}
    try:
        status = fields.parse_object(read_bounded_text(path, MOST))
        if fields.text(status, "state") not in STATES:
            raise ValueError(f"'state' is {shortened(status['state'])}")
    except (OSError, ValueError) as error:
        warn(f"{path}: {error}; taken for no status")
        return {}
    return status


def _epochs(status: fields.Record) -> dict[str, int]:
    epochs = status.get("epochs")
    if not isinstance(epochs, dict):
        return {}
    return {
        str(stage): count
        for stage, count in epochs.items()
        if isinstance(count, int) and not isinstance(count, bool) and 0 < count <= MOST_EPOCHS
    }


def _done(lines: list[EpochLine], epochs: dict[str, int]) -> int:
    if not epochs:
        return len(lines)
    return sum(line.epoch <= epochs.get(line.stage, 0) for line in lines)


def _seconds_left(lines: list[EpochLine], epochs: int) -> float | None:
    """Return the time of ``epochs`` more epochs like those of the last line's stage.

    From one epoch's end to the next, so that evaluation counts; the median passes over a stop.
    """
    dates = [line.date for line in lines if line.date and line.stage == lines[-1].stage]
    if len(dates) < 2 or epochs < 0:
        return None
    spans = [(after - before).total_seconds() for before, after in pairwise(dates)]
    return max(statistics.median(spans), 0.0) * epochs
