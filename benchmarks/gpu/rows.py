"""The rows of a command: each is measured in another process, and then written at once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.worker import Measurement, Values, Worker
from sskd.errors import UserError
from sskd.files import write_text
from sskd.output import say

# Makes a measurement within a number of seconds; returns None if the time did not suffice.
Measure = Callable[[Measurement, float], Values | None]


@dataclass(frozen=True)
class Command:
    """A command: its measurements and its tables.

    ``measurements`` returns the measurement of each key, ``settings`` what decides their values
    beside the keys, ``table`` the lines of markdown for the finished rows. ``measure`` makes a
    measurement in this process; by default a ``Worker`` does.
    """

    measurements: Callable[[argparse.Namespace], Iterable[tuple[str, Measurement]]]
    settings: Callable[[argparse.Namespace], Values]
    table: Callable[[Mapping[str, Values], argparse.Namespace], Sequence[str]]
    measure: Measure | None = None


@dataclass(frozen=True)
class RowFile:
    """The result file of a command: a line of JSON for each finished row.

    Attributes:
        settings: what decides the values of the rows beside their keys; each line has it too.
    """

    path: Path
    settings: Values

    def read(self, *, retry: bool) -> dict[str, Values]:
        """Return the rows by key; without those that failed if ``retry``.

        Raises:
            UserError: a row was measured with other settings.
        """
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [row for row in map(json.loads, lines) if not (retry and "error" in row)]
        for row in rows:
            self._refuse_others(row.pop("settings", {}))
        return {row.pop("key"): row for row in rows}

    def write(self, found: Mapping[str, Values]) -> None:
        """Write the rows."""
        rows = ({"key": key, "settings": self.settings, **found[key]} for key in found)
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in rows))

    def _refuse_others(self, before: Values) -> None:
        others = [
            f"{as_typed(name)} {shown(before.get(name, 'unknown'))} (now {shown(value)})"
            for name, value in self.settings.items()
            if before.get(name) != value
        ]
        if others:
            raise UserError(
                f"{self.path}: its rows were measured with {', '.join(others)}; use the earlier "
                "values, or another folder: --out FOLDER"
            )


def row_file(name: str, command: Command, options: argparse.Namespace) -> RowFile:
    """Return the result file of a command."""
    return RowFile(options.out / f"{name}.jsonl", command.settings(options))


def settings_of(options: argparse.Namespace, *names: str) -> Values:
    """Return some options, and the name of the device."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    named = torch.cuda.get_device_name(device) if on_gpu else device.type
    return {**{name: getattr(options, name) for name in names}, "device": named}


def measure_rows(name: str, command: Command, options: argparse.Namespace, title: str) -> None:
    """Measure the rows that are not in the result file, until the time is up.

    Raises:
        UserError: the rows in the file were measured with other settings.
    """
    end = time.monotonic() + 60 * options.minutes
    file = row_file(name, command, options)
    found = file.read(retry=options.retry)
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
            file.write(found)
            say(f"{name}: {key}: {in_short(values)}")
            lines = [title, "", *command.table(found, options)]
            file.path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    finally:
        worker.end()
    missing = len(measurements.keys() - found.keys())
    rows = "1 row is" if missing == 1 else f"{missing} rows are"
    say(f"{name}: {rows} left; the same command continues" if missing else f"{name}: done")


def in_short(values: Values) -> str:
    """Return the numbers and texts of a row in a line."""
    shown = (
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if not isinstance(value, list) or value == []
    )
    return ", ".join(shown)


def as_typed(name: str) -> str:
    """Return the name of a setting on the command line; that of a device is not typed."""
    return name if name == "device" else f"--{name.replace('_', '-')}"


def shown(value: object) -> str:
    """Return the value of a setting in an error message."""
    return " ".join(value) or "nothing" if isinstance(value, list) else str(value)
