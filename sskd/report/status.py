"""Read what each job of a sweep is doing from its folder: state, progress, time left."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from sskd.errors import mask_unprintable
from sskd.files import is_regular_file
from sskd.report.metrics import read_metrics
from sskd.report.results import find_files
from sskd.runs import fields
from sskd.runs.epoch_line import EpochLine
from sskd.runs.lock import is_held
from sskd.runs.names import LAST, RESULT
from sskd.runs.status import STATUS, Status, parse_status

# In the order of the lists. "interrupted" is not in any file: the status is "running", but the
# process has died.
STATES = ("running", "queued", "stopped", "interrupted", "failed", "finished")


@dataclass(frozen=True)
class JobStatus:
    """One run's folder, its state and its progress. None: not known.

    Attributes:
        folder: relative to the folder of runs.
        done: finished epochs of all phases.
        total: epochs of all phases.
        rate: images per second.
        seconds_left: an estimate for a running job.
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
        """The folder as printable text."""
        return mask_unprintable(str(self.folder))


def read_jobs(root: Path, warn: Callable[[str], None]) -> list[JobStatus]:
    """Return the jobs under ``root``, sorted by state and then by path.

    A folder without a status is finished if it has a result, and stopped if it has a checkpoint.
    A malformed status is ignored and reported through ``warn``.
    """
    names = (STATUS, RESULT, LAST)
    folders = dict.fromkeys(path.parent for path in find_files(root, names, warn))
    jobs = [job for folder in folders for job in _read_job(folder, root, warn)]
    return sorted(jobs, key=lambda job: STATES.index(job.state))


def _read_job(folder: Path, root: Path, warn: Callable[[str], None]) -> Iterator[JobStatus]:
    name = folder.relative_to(root)
    if is_regular_file(folder / RESULT):
        yield JobStatus(name, "finished")
        return
    status = _read_status(folder, warn)
    if status == Status() and not is_regular_file(folder / LAST):
        return
    state: str = status.state or "stopped"
    if state == "running" and not is_held(folder):
        state = "interrupted"
    lines = read_metrics(folder, warn)
    total, done = sum(status.epochs.values()), _count_done(lines, status.epochs)
    yield JobStatus(
        name,
        state,
        since=status.since,
        host=fields.one_line(status.host),
        error=fields.one_line(status.error) if state == "failed" else None,
        command=fields.one_line(status.command),
        done=done,
        total=total or None,
        rate=lines[-1].metrics.get("images_per_second") if lines else None,
        seconds_left=_seconds_left(lines, total - done) if state == "running" else None,
    )


def _read_status(folder: Path, warn: Callable[[str], None]) -> Status:
    try:
        return parse_status(folder)
    except (OSError, ValueError) as error:
        warn(f"{folder / STATUS}: {error}; ignored")
        return Status()


def _count_done(lines: list[EpochLine], epochs: Mapping[str, int]) -> int:
    if not epochs:
        return len(lines)
    return sum(line.epoch <= epochs.get(line.phase, 0) for line in lines)


def _seconds_left(lines: list[EpochLine], epochs: int) -> float | None:
    """Return the time that ``epochs`` more epochs of the current phase will take.

    The time between the ends of two epochs includes evaluation. The median ignores interruptions.
    """
    dates = [line.date for line in lines if line.date and line.phase == lines[-1].phase]
    if len(dates) < 2 or epochs < 0:
        return None
    spans = [(after - before).total_seconds() for before, after in pairwise(dates)]
    return max(statistics.median(spans), 0.0) * epochs
