"""The rows of the tables: their order and their names."""

from __future__ import annotations

from sskd.report.published import STUDENT_ROW, TEACHER_ROW
from sskd.report.result import DIGEST, Settings

# The order of rows where nothing is published; other methods follow in alphabetical order.
ROWS = (
    *(TEACHER_ROW, STUDENT_ROW, "KD", "FitNet", "AT", "SP", "VID"),
    *("RKD", "PKT", "AB", "FT", "CRD", "SSKD"),
)
DISPLAY_NAMES = {
    "kd": "KD",
    "fitnet": "FitNet",
    "at": "AT",
    "sp": "SP",
    "vid": "VID",
    "rkd": "RKD",
    "pkt": "PKT",
    "ab": "AB",
    "ft": "FT",
    "crd": "CRD",
    "sskd": "SSKD",
    "cc": "CC",
    "nst": "NST",
    "fsp": "FSP",
}

# A row: its name, and what sets its runs apart from the plain row of that name.
RowKey = tuple[str, Settings]
TEACHER: RowKey = (TEACHER_ROW, ())
STUDENT: RowKey = (STUDENT_ROW, ())
KD: RowKey = ("KD", ())


def display_name(method: str) -> str:
    """Return the name of ``method`` as the papers write it."""
    return DISPLAY_NAMES.get(method, method.upper())


def settings_text(settings: Settings) -> str:
    """Return settings as ``key=value, key=value``; a digest is cut to its first 8 digits."""
    return ", ".join(f"{key}={value[:8] if key == DIGEST else value}" for key, value in settings)


def row_label(row: RowKey) -> str:
    """Return a row's name, followed by what sets its runs apart."""
    name, variant = row
    return f"{name} ({settings_text(variant)})" if variant else name
