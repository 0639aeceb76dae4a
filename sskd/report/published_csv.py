"""Read the CSV files of published values that the package contains."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from importlib import resources

from sskd.errors import UserError


def read_csv(
    file: str,
    columns: Sequence[str],
    key: Sequence[str],
    numbers: Sequence[str] = ("top1",),
    optional: Collection[str] = (),
) -> list[dict[str, str]]:
    """Return the lines of the CSV ``file`` beside this module, by column.

    Args:
        columns: the header.
        key: the columns that no two lines have in common.
        numbers: the columns of numbers above 0 and up to 100.
        optional: the columns that may be empty.

    Raises:
        UserError: a line is malformed; the message has its number.
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
            line = _check_line(row, columns, numbers, optional)
            found = tuple(line[name] for name in key)
            _require(found not in lines, f"{', '.join(found)} has a value already")
            lines[found] = line
        _require(bool(lines), "has no values")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {number}: {error}; reinstall the package") from None
    return list(lines.values())


def _check_line(
    row: Sequence[str], columns: Sequence[str], numbers: Sequence[str], optional: Collection[str]
) -> dict[str, str]:
    _require(len(row) == len(columns), f"has {len(row)} columns, not {len(columns)}")
    line = dict(zip(columns, row, strict=True))
    missing = [key for key in columns if not line[key] and key not in optional]
    _require(not missing, f"has no {', '.join(missing)}")
    for name in numbers:
        valid = not line[name] or 0 < float(line[name]) <= 100
        _require(valid, f"{name} is {line[name]}, not from 0 to 100")
    return line


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
