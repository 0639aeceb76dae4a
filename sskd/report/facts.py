"""Read the published figures that lie beside this module as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from importlib import resources

from sskd.errors import UserError


def read_figures(
    file: str,
    columns: Sequence[str],
    cell: Sequence[str],
    numbers: Sequence[str] = ("top1",),
    optional: Collection[str] = (),
) -> list[dict[str, str]]:
    """Return the lines of the CSV ``file`` by column.

    Args:
        columns: the names in its first line.
        cell: the columns that set a line apart from all others.
        numbers: the columns whose text is a number above 0 and up to 100.
        optional: the columns that may be empty.

    Raises:
        UserError: a line is damaged; the message has its number.
    """
    path = resources.files(__package__).joinpath(file)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    number = 0
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        for number, row in enumerate(rows, start=1):
            if number == 1:
                _require(row == list(columns), f"should be {','.join(columns)}")
                continue
            _require(len(row) == len(columns), f"has {len(row)} columns, not {len(columns)}")
            line = dict(zip(columns, row, strict=True))
            missing = [key for key in columns if not line[key] and key not in optional]
            _require(not missing, f"has no {', '.join(missing)}")
            for name in numbers:
                valid = not line[name] or 0 < float(line[name]) <= 100
                _require(valid, f"{name} is {line[name]}, not from 0 to 100")
            key = tuple(line[name] for name in cell)
            _require(key not in lines, f"{', '.join(key)} has a figure already")
            lines[key] = line
        _require(bool(lines), "has no figures")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {number}: {error}; install the package again") from None
    return list(lines.values())


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
