"""Read the fields of an untrusted JSON object.

Each function returns a value of its type or raises ValueError with the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from sskd.errors import mask_unprintable, shortened

Record = Mapping[str, object]
_DEEPEST = 50  # levels; a result has four


def parse_object(text: str) -> Record:
    """Return the JSON object in ``text``."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    _refuse_deep(record)
    return record


def _refuse_deep(record: Record) -> None:
    """Raise ValueError if ``record`` is too deep for a recursive function."""
    level: list[object] = [record]
    for _ in range(_DEEPEST):
        nested = [each for each in level if isinstance(each, dict | list)]
        level = [
            part for each in nested for part in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def get(record: Record, key: str) -> object:
    """Return the value of ``key``, which is required."""
    if key not in record:
        raise ValueError(f"has no '{key}'")
    return record[key]


def mapping(record: Record, key: str) -> Record:
    """Return a nested JSON object."""
    value = get(record, key)
    if not isinstance(value, dict):
        raise ValueError(f"'{key}' is not an object")
    return value


def text(record: Record, key: str) -> str:
    """Return a name: printable and not empty."""
    value = get(record, key)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"'{key}' is not a name")
    return value


def text_or_none(record: Record, key: str) -> str | None:
    """Return ``text``, or None if it is null or missing."""
    return None if record.get(key) is None else text(record, key)


def integer(record: Record, key: str) -> int:
    """Return a whole number, 0 or more."""
    value = get(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"'{key}' is not an integer of at least 0")
    return value


def integer_or_none(record: Record, key: str) -> int | None:
    """Return ``integer``, or None if it is null or missing."""
    return None if record.get(key) is None else integer(record, key)


def number(record: Record, key: str, low: float = 0.0, high: float = sys.float_info.max) -> float:
    """Return a finite number from ``low`` to ``high``."""
    value = get(record, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"'{key}' is not a number")
    # This also refuses NaN and infinity, which Python writes into JSON.
    if not low <= value <= high:
        raise ValueError(f"'{key}' is {shortened(value)}, out of range")
    return float(value)


def number_or_none(
    record: Record, key: str, low: float = 0.0, high: float = sys.float_info.max
) -> float | None:
    """Return ``number``, or None if it is null or missing."""
    return None if record.get(key) is None else number(record, key, low, high)


def flag_or_none(record: Record, key: str) -> bool | None:
    """Return true or false, or None if it is null or missing."""
    value = record.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"'{key}' is not true or false")
    return value


def mapping_or_none(record: Record, key: str) -> Record | None:
    """Return a nested JSON object, or None if it is null or missing."""
    return None if record.get(key) is None else mapping(record, key)


def one_line(value: object) -> str | None:
    """Return ``value`` as a printable text on one line; None if it is not a text, or empty."""
    if not isinstance(value, str) or not value.strip():
        return None
    return mask_unprintable(" ".join(value.split()))


def timestamp(record: Record, key: str) -> datetime | None:
    """Return a time in ISO 8601, in UTC if it has no zone; None if it is missing or malformed."""
    try:
        found = datetime.fromisoformat(str(record.get(key)))
    except ValueError:
        return None
    if not 1970 <= found.year < 9999:  # outside, a conversion of the zone can overflow
        return None
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
