"""The rows of a command: each is measured in another process, and then written at once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.worker import Measurement, Values, Worker
from sskd.files import write_text
from sskd.output import say

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
