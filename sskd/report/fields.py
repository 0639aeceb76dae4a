"""Read fields of JSON that anyone may have written: each is what it should be, or a ValueError."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime

from sskd.errors import mask_unprintable, shortened

Record = dict[str, object]


def parse_object(text: str) -> Record:
    """Return the JSON object that ``text`` is."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("not JSON (recursion too deep)") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def get(record: Record, key: str) -> object:
    """Return the value of ``key``, which must be there."""
    if key not in record:
        raise ValueError(f"has no '{key}'")
    return record[key]


def text(record: Record, key: str) -> str:
    """Return a name: printable, not empty."""
    value = get(record, key)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"'{key}' is not a name")
    return value


def integer(record: Record, key: str) -> int:
    """Return a whole number, 0 or more."""
    value = get(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"'{key}' is not a whole number")
    return value


def number(record: Record, key: str, low: float = 0.0, high: float = sys.float_info.max) -> float:
    """Return a finite number from ``low`` to ``high``."""
    value = get(record, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"'{key}' is not a number")
    # False for NaN as well, and for infinity, which JSON files of Python's can hold.
    if not low <= value <= high:
        raise ValueError(f"'{key}' is {shortened(value)}, out of range")
    return float(value)


def number_or_none(
    record: Record, key: str, low: float = 0.0, high: float = sys.float_info.max
) -> float | None:
    """Return ``number``, or None where it is null."""
    return None if get(record, key) is None else number(record, key, low, high)


def optional_text(record: Record, key: str) -> str | None:
    """Return a text that only people read, on one line, or None where there is none."""
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        return None
    return mask_unprintable(" ".join(value.split()))


def timestamp(record: Record, key: str) -> datetime | None:
    """Return a moment in ISO 8601, of UTC where it names no zone; None where it is none."""
    try:
        found = datetime.fromisoformat(str(record.get(key)))
    except ValueError:
        return None
    if not 1970 <= found.year < 9999:  # at its ends, a change of zone would leave the calendar
        return None
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
