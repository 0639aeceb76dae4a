"""The rows of a command: each is measured in another process, and then written at once."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sskd
from sskd.errors import one_line
from sskd.files import write_text
from sskd.output import say

SUITE = Path(sskd.__file__).parent
ROW_SECONDS = 200  # the longest time of a row: longer means that it hangs

Values = dict[str, Any]  # a row of the result file, without its key
Measurement = Callable[..., Any]  # returns the Values of a row
# Makes a measurement within some seconds; None if they were too few, so that the row is left.
Measure = Callable[[Measurement, float], Values | None]


@dataclass(frozen=True)
class Command:
    """A command: its measurements and its tables.

    ``measurements`` returns the measurement of each key, ``table`` the lines of markdown for the
    finished rows. ``measure`` makes a measurement in this process; by default a ``Worker`` does.
    """

    measurements: Callable[[argparse.Namespace], Iterable[tuple[str, Measurement]]]
    table: Callable[[Mapping[str, Values], argparse.Namespace], Sequence[str]]
    measure: Measure | None = None


def measure_rows(name: str, command: Command, options: argparse.Namespace, title: str) -> None:
    """Measure the rows that are not in the result file, until the time is up."""
    end = time.monotonic() + 60 * options.minutes
    path = options.out / f"{name}.jsonl"
    found = read_rows(path, retry=options.retry)
    measurements = dict(command.measurements(options))
    worker = Worker()
    measure = command.measure or worker.measure
    try:
        for key, measurement in measurements.items():
            if key in found:
                continue
            left = end - time.monotonic()
            if left <= 0 or (values := measure(measurement, left)) is None:
                break
            found[key] = values
            write_rows(path, found)
            say(f"{name}: {key}: {in_short(values)}")
            lines = [title, "", *command.table(found, options)]
            path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    finally:
        worker.end()
    missing = len(measurements.keys() - found.keys())
    rows = "1 row is" if missing == 1 else f"{missing} rows are"
    say(f"{name}: {rows} left; the same command continues" if missing else f"{name}: done")


def read_rows(path: Path, *, retry: bool) -> dict[str, Values]:
    """Return the rows of a result file by key; without those that failed if ``retry``."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    found = {row.pop("key"): row for row in rows}
    return {key: row for key, row in found.items() if not (retry and "error" in row)}


def write_rows(path: Path, found: Mapping[str, Values]) -> None:
    """Write the result file."""
    lines = [json.dumps({"key": key, **values}) for key, values in found.items()]
    write_text(path, "\n".join([*lines, ""]))


def in_short(values: Values) -> str:
    """Return the numbers and texts of a row in a line."""
    shown = (
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if not isinstance(value, list) or value == []
    )
    return ", ".join(shown)


class Worker:
    """A process that makes one measurement after the other.

    A new one takes its place if a measurement fails, since an error can leave a GPU's process
    unusable.
    """

    def __init__(self) -> None:
        self._process: Any = None

    def measure(self, measurement: Measurement, seconds: float) -> Values | None:
        """Return what ``measurement`` returns, or its ``error``.

        None if it needs more than ``seconds``.
        """
        if self._process is None:
            self._start()
        self._connection.send(measurement)
        if not self._connection.poll(min(seconds, ROW_SECONDS)):
            self.end()
            return None if seconds < ROW_SECONDS else {"error": f"hangs for {ROW_SECONDS} s"}
        try:
            values: Values = self._connection.recv()
        except EOFError:
            self._process.join()
            values = {"error": f"the process ended with status {self._process.exitcode}"}
        if "error" in values:
            self.end()
        return values

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        self._process.start()
        other.close()

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(connection: Connection) -> None:
    """Make the measurements that arrive, until nobody sends any."""
    while True:
        try:
            measurement = connection.recv()
        except EOFError:
            return
        try:
            values = measurement()
        except Exception as error:
            values = {"error": describe(error)}
        connection.send(values)


def describe(error: BaseException) -> str:
    """Return the type and message of ``error``, and the last line of the suite that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(SUITE)]
    place = f" ({Path(own[-1].filename).relative_to(SUITE)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)[-300:]}{place}"
