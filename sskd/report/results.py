"""Find the ``result.json`` of every finished run and read it, trusting nothing in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Epoch = Literal["last", "best"]
Settings = tuple[tuple[str, str], ...]

RESULT_FILE = "result.json"
# What differs under these keys belongs to one row of a table; all else is the table's setting.
ROW_KEYS = ("teacher.", "method.")


@dataclass(frozen=True)
class Result:
    """What one finished run reached.

    Accuracies and ``agreement`` are percentages, ``kl`` is in nats. ``teacher`` is None for a
    network trained from scratch, whose name is ``student``. ``difference`` holds what the run
    changed in the recipe: dotted keys and their values as text, sorted by key.
    """

    kind: str
    dataset: str
    teacher: str | None
    student: str
    method: str
    seed: int
    difference: Settings
    last: float
    best: float
    teacher_top1: float | None
    agreement: float | None
    kl: float | None
    seconds: float
    images_per_second: float
    parameters: int

    @property
    def setting(self) -> Settings:
        """The part of the difference that all runs of one table share."""
        return tuple(item for item in self.difference if not item[0].startswith(ROW_KEYS))

    @property
    def variant(self) -> Settings:
        """The part of the difference that gives the run a row of its own."""
        return tuple(item for item in self.difference if item[0].startswith(ROW_KEYS))

    def top1(self, epoch: Epoch) -> float:
        """Return the test accuracy, in percent, of the last or of the best epoch."""
        return self.last if epoch == "last" else self.best


def read_results(root: Path, warn: Callable[[str], None]) -> list[Result]:
    """Read all results under ``root``, in the order of their paths.

    A file that is no readable result is told to ``warn`` in one line and left out, and so is a
    second result of the same configuration and seed (a copied folder, which would make the
    spread over seeds look smaller than it is).
    """
    found: dict[tuple[object, ...], Path] = {}
    results = []
    for path in find_result_files(root, warn):
        try:
            result = parse_result(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            warn(f"{path}: {error}; left out")
            continue
        if result is None:
            continue
        identity = (
            *(result.kind, result.dataset, result.teacher, result.student),
            *(result.method, result.seed, result.difference),
        )
        if identity in found:
            warn(f"{path}: the same configuration and seed as {found[identity]}; left out")
            continue
        found[identity] = path
        results.append(result)
    return results


def find_result_files(root: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    """Yield each ``result.json`` under ``root``; hidden folders and links are passed over."""
    for folder, subfolders, files in os.walk(root, onerror=lambda error: warn(str(error))):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        path = Path(folder, RESULT_FILE)
        # Only plain files: opening a named pipe would wait for ever.
        if RESULT_FILE in files and path.is_file() and not path.is_symlink():
            yield path


def parse_result(text: str) -> Result | None:
    """Return the result that ``text``, a JSON object, describes; None for a teacher's first phase.

    Raises ValueError with the reason in words where it describes none.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    kind = _text(record, "kind")
    if kind == "phase":
        return None
    if kind not in ("scratch", "distill"):
        raise ValueError(f"'kind' is {kind!r}, neither 'scratch' nor 'distill'")
    if kind == "scratch" and _get(record, "teacher") is not None:
        raise ValueError("'teacher' is not null in a run from scratch")
    top1 = _get(record, "top1")
    if not isinstance(top1, dict):
        raise ValueError("'top1' is not an object")
    return Result(
        kind=kind,
        dataset=_text(record, "dataset"),
        teacher=_text(record, "teacher") if kind == "distill" else None,
        student=_text(record, "student"),
        method=_text(record, "method"),
        seed=_integer(record, "seed"),
        difference=_difference(_get(record, "difference")),
        last=_number(top1, "last", high=100),
        best=_number(top1, "best", high=100),
        teacher_top1=_number_or_none(record, "teacher_top1", high=100),
        agreement=_number_or_none(record, "agreement", high=100),
        # Rounding can take a divergence of two equal distributions just below zero.
        kl=_number_or_none(record, "kl", low=-1e-3),
        seconds=_number(record, "seconds"),
        images_per_second=_number(record, "images_per_second"),
        parameters=_integer(record, "parameters"),
    )


def _get(record: dict[str, object], key: str) -> object:
    if key not in record:
        raise ValueError(f"has no '{key}'")
    return record[key]


def _text(record: dict[str, object], key: str) -> str:
    value = _get(record, key)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"'{key}' is not a name")
    return value


def _integer(record: dict[str, object], key: str) -> int:
    value = _get(record, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"'{key}' is not a whole number")
    return value


def _number(
    record: dict[str, object], key: str, low: float = 0.0, high: float = sys.float_info.max
) -> float:
    value = _get(record, key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"'{key}' is not a number")
    # False for NaN as well, and for infinity, which JSON files of Python's can hold.
    if not low <= value <= high:
        raise ValueError(f"'{key}' is {value}, out of range")
    return float(value)


def _number_or_none(
    record: dict[str, object], key: str, low: float = 0.0, high: float = sys.float_info.max
) -> float | None:
    return None if _get(record, key) is None else _number(record, key, low, high)


def _difference(value: object) -> Settings:
    if not isinstance(value, dict):
        raise ValueError("'difference' is not an object")
    if not all(key and key.isprintable() for key in value):
        raise ValueError("'difference' has a key that is not a name")
    return tuple(sorted((key, _as_text(item)) for key, item in value.items()))


def _as_text(value: object) -> str:
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value)
