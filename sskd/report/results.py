"""Find the ``result.json`` of every finished run and read it, trusting nothing in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sskd.errors import shortened
from sskd.files import MOST_DEPTH, is_regular_file, is_too_deep, read_bounded_text
from sskd.overrides import flatten
from sskd.report import fields
from sskd.report.apart import tell_apart
from sskd.report.origin import Origin, parse_origin, read_origin
from sskd.report.result import Result, Settings
from sskd.runs.names import MOST_RESULT, NAME, RESULT
from sskd.runs.weightings import RECIPE, name_weighting


def read_results(root: Path, warn: Callable[[str], None]) -> list[Result]:
    """Read all results under ``root``, in the order of their paths.

    A file that is no readable result is told to ``warn`` in one line and left out, and so is a
    second result of the same configuration and seed (a copied folder, which would make the
    spread over seeds look smaller than it is). Results that have one name but are of different
    data have different names of the dataset afterwards; see ``sskd.report.apart``.
    """
    results = []
    for path in find_files(root, [RESULT], warn):
        try:
            result = parse_result(read_bounded_text(path, MOST_RESULT), path.parent)
        except (OSError, ValueError) as error:
            warn(f"{path}: {error}; left out")
            continue
        if result is None:
            continue
        if result.origin == Origin():
            result = replace(result, origin=read_origin(path.parent))
        results.append(result)
    return list(_without_copies(tell_apart(results, warn), warn))


def _without_copies(results: Iterable[Result], warn: Callable[[str], None]) -> Iterator[Result]:
    found: dict[tuple[object, ...], list[Result]] = {}
    for run in results:
        same = found.setdefault(
            (run.kind, run.dataset, run.teacher, run.student, run.method, run.seed, run.difference),
            [],
        )
        first = next((other for other in same if _may_be_one(run, other)), None)
        if first is None:
            same.append(run)
            yield run
            continue
        other = (
            "" if run.last == first.last else f" (last top-1 {first.last:.2f}, here {run.last:.2f})"
        )
        warn(
            f"{run.folder / RESULT}: the same configuration and seed as {first.folder / RESULT}"
            f"{other}; left out"
        )


def _may_be_one(run: Result, other: Result) -> bool:
    """Return whether two runs of one configuration and seed had, as far as known, one teacher."""
    teachers = {run.origin.teacher, other.origin.teacher} - {None}
    return len(teachers) < 2


def find_files(root: Path, names: Iterable[str], warn: Callable[[str], None]) -> Iterator[Path]:
    """Yield the files under ``root`` with one of ``names``, but not in hidden folders; no links.

    What lies too deep is left out and reported once through ``warn``.
    """
    deep: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=lambda error: warn(str(error))):
        if is_too_deep(folder, root):
            deep.append(folder)
            subfolders.clear()
            continue
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        for path in (Path(folder, name) for name in names if name in files):
            if is_regular_file(path):
                yield path
    if deep:
        more = f" and {len(deep) - 1} more" if deep[1:] else ""
        warn(
            f"{shortened(deep[0], 120)}{more}: more than {MOST_DEPTH} folders below "
            f"{shortened(str(root), 120)}; left out"
        )


def parse_result(text: str, folder: Path) -> Result | None:
    """Return the result that ``text``, a JSON object, describes; None for what students share.

    Raises ValueError with the reason in words where it describes none.
    """
    record = fields.parse_object(text)
    kind = fields.text(record, "kind")
    if kind == "phase":
        return None
    if kind not in ("scratch", "distill"):
        raise ValueError(f"'kind' is {shortened(kind)}, neither 'scratch' nor 'distill'")
    if kind == "scratch" and fields.get(record, "teacher") is not None:
        raise ValueError("'teacher' is not null in a run from scratch")
    memory = {"peak_memory_mib": None} | record  # older results do not tell it
    top1 = fields.get(record, "top1")
    if not isinstance(top1, dict):
        raise ValueError("'top1' is not an object")
    method = fields.text(record, "method")
    return Result(
        kind=kind,
        dataset=fields.text(record, "dataset"),
        teacher=fields.text(record, "teacher") if kind == "distill" else None,
        student=fields.text(record, "student"),
        method=method,
        seed=fields.integer(record, "seed"),
        difference=_difference(record, method),
        last=fields.number(top1, "last", high=100),
        best=fields.number(top1, "best", high=100),
        teacher_epoch=(
            None if record.get("teacher_epoch") is None else fields.text(record, "teacher_epoch")
        ),
        teacher_top1=fields.number_or_none(record, "teacher_top1", high=100),
        agreement=fields.number_or_none(record, "agreement", high=100),
        # Rounding can take a divergence of two equal distributions just below zero.
        kl=fields.number_or_none(record, "kl", low=-1e-3),
        seconds=fields.number(record, "seconds"),
        images_per_second=fields.number(record, "images_per_second"),
        parameters=fields.integer(record, "parameters"),
        peak_memory_mib=fields.number_or_none(memory, "peak_memory_mib"),
        commit=fields.optional_text(record, "commit"),
        epochs=fields.integer(record, "epoch") if "epoch" in record else None,
        origin=parse_origin(record),
        folder=folder,
        settings=_settings(record),
    )


# Runs of one row differ in these on purpose, or the table shows them in other ways.
_NOT_SETTINGS = ("seed", "dataset.name", "dataset.digest", "teacher.digest")


def _settings(record: fields.Record) -> Settings:
    """Return what the result says of its run's settings, as text by dotted key, sorted."""
    named = record.get(NAME)
    if not isinstance(named, dict):
        return ()
    try:
        flat = flatten(named)
    except RecursionError:
        raise ValueError(f"'{NAME}' is nested too deeply") from None
    return tuple(sorted((k, _as_text(v)) for k, v in flat.items() if k not in _NOT_SETTINGS))


def _recipe(record: fields.Record) -> int:
    """Return the number of the recipe that the result's ``difference`` is a difference from."""
    recipe = fields.integer({"recipe": 1} | record, "recipe")
    if not 1 <= recipe <= RECIPE:
        raise ValueError(
            f"'recipe' is {shortened(recipe)}, but this version of sskd knows 1 to {RECIPE}"
        )
    return recipe


def _difference(record: fields.Record, method: str) -> Settings:
    value = fields.get(record, "difference")
    if not isinstance(value, dict):
        raise ValueError("'difference' is not an object")
    if not all(key and key.isprintable() for key in value):
        raise ValueError("'difference' has a key that is not a name")
    texts = {key: _as_text(item) for key, item in value.items()}
    return tuple(sorted(name_weighting(method, _recipe(record), texts).items()))


def _as_text(value: object) -> str:
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value)
