"""``metrics.jsonl``: one line for each epoch of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any

from sskd.distributed import ranks
from sskd.errors import CorruptFileError, UserError
from sskd.files import append_line, read_lines, write_atomically
from sskd.runs import fields
from sskd.runs.epoch_line import EpochLine
from sskd.runs.lock import FolderLock
from sskd.runs.names import LAST, METRICS, MOST_EPOCHS, MOST_METRICS


class MetricsLog:
    """The metrics of a run's epochs, in memory and on disk.

    Attributes:
        lines: the epochs so far, in order; empty on all ranks but the first.
    """

    def __init__(self, folder: Path, lock: FolderLock) -> None:
        self.lines: list[EpochLine] = []
        self._path = folder / METRICS
        self._lock = lock
        self._digest = hashlib.sha256()
        self._subscribers: list[Callable[[EpochLine], object]] = []
        self._notified = 0

    def subscribe(self, subscriber: Callable[[EpochLine], object]) -> None:
        """Call ``subscriber`` with each line so far, and in each later ``notify``."""
        for line in self.lines:
            subscriber(line)
        self._subscribers.append(subscriber)
        self._notified = len(self.lines)

    def log(self, line: EpochLine) -> None:
        """Append one line; of several ranks, the first one does."""
        ranks.from_first(lambda: self._append(line))

    def _append(self, line: EpochLine) -> None:
        text = json.dumps(line.to_json())
        with self._lock.writing() as still_ours:
            append_line(self._path, text, still_ours=still_ours)
        self._digest.update(f"{text}\n".encode())
        self.lines.append(line)

    def notify(self) -> None:
        """Pass the lines since the last call to the subscribers; a checkpoint covers them.

        A line that none covers is cut off if the run crashes, and its epoch is computed again.
        """
        for line in self.lines[self._notified :]:
            for subscriber in self._subscribers:
                subscriber(line)
        self._notified = len(self.lines)

    def position(self) -> dict[str, Any]:
        """Return the number of lines and their SHA-256, as a checkpoint keeps them."""
        return {"lines": len(self.lines), "metrics_digest": self._digest.hexdigest()}

    def lines_at(self, checkpoint: dict[str, Any]) -> list[bytes]:
        """Return the lines that the file had when ``checkpoint`` was saved.

        Raises:
            CorruptFileError: they were changed or lost; ``checkpoint`` is not a run's checkpoint.
        """
        count, digest = checkpoint.get("lines"), checkpoint.get("metrics_digest")
        if not isinstance(count, int):
            raise CorruptFileError(LAST, "it is not a run's checkpoint")
        lines = list(islice(self._read_lines(), max(count, 0))) if self._path.exists() else []
        # Checkpoints of the first version have no digest, only the number of lines.
        if len(lines) < count or digest not in (None, hashlib.sha256(b"".join(lines)).hexdigest()):
            raise CorruptFileError(METRICS, "lines of it were changed or lost")
        _parse(lines)
        return lines

    def rewind(self, lines: list[bytes]) -> None:
        """Keep only ``lines``, which ``lines_at`` returned."""
        self.lines = _parse(lines)
        self._digest = hashlib.sha256(b"".join(lines))
        # A new file, because an earlier holder of the folder may still append to the old one.
        write = methodcaller("writelines", lines)
        with self._lock.writing() as still_ours:
            write_atomically(self._path, write, still_ours=still_ours)

    def read(self) -> list[EpochLine]:
        """Return all lines of the file of a finished run.

        Raises:
            UserError: the file is corrupt.
        """
        try:
            return _parse(self._read_lines())
        except (CorruptFileError, OSError) as error:
            raise UserError(
                f"{self._path.parent}: {error}; delete this folder and rerun the same command"
            ) from None

    def _read_lines(self) -> Iterator[bytes]:
        try:
            yield from read_lines(self._path, MOST_METRICS, MOST_EPOCHS)
        except ValueError as error:
            raise CorruptFileError(METRICS, str(error)) from None


def _parse(lines: Iterable[bytes]) -> list[EpochLine]:
    """Return the epochs in ``lines``; raise CorruptFileError if a line is malformed."""
    try:
        return [EpochLine.from_json(fields.parse_object(line.decode())) for line in lines]
    except ValueError as error:
        raise CorruptFileError(METRICS, str(error)) from None
