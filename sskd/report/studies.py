"""Find the studies among results: runs that agree in all settings but one, and their seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sskd.report.groups import ALONE, row_order
from sskd.report.published import ROWS, STUDENT, Pair, RowKey, display_name, settings_text
from sskd.report.published_studies import (
    PublishedLine,
    Value,
    as_value,
    comparable_lines,
    published_row,
    source_of,
    studied_keys,
    value_text,
    without,
)
from sskd.report.recipe_values import recipe_value
from sskd.report.results import (
    DIGEST,
    ROW_KEYS,
    FinishedRun,
    Settings,
    numeric_order,
    without_digest,
)

# Two values of a setting are two rows or two tables, which are as readable as a study. If the
# setting has published studies, two are a study, because the published values complete it.
MIN_VALUES, MIN_PUBLISHED = 3, 2
# Numbers that only select images or weights, and the key that the report itself adds.
NOT_STUDIED = frozenset({"seed", "dataset.seed", "teacher.seed", "dataset.holdout", "epochs"})
METHOD = "method."
EPOCHS, TEACHER_EPOCHS = "schedule.epochs", "teacher.epochs"
MOST_KEYS = 50  # changed settings of a run; no run of a study changes as many
NETWORKS = "networks"

Cells = dict[Value, tuple[FinishedRun, ...]]  # the runs of a line by value, sorted
Lines = dict[RowKey, Cells]
Rows = Mapping[RowKey, Mapping[Value, Sequence[FinishedRun]]]  # lines that may yet be left out
# The dataset, the pair (None: networks alone), the key, and the setting that all runs share.
Place = tuple[str, Pair | None, str, Settings]


@dataclass(frozen=True)
class Study:
    """A setting at several values: one line for each method, or for each network alone.

    Attributes:
        pair: teacher and student; None for networks trained from scratch.
        key: the setting that differs.
        setting: what all runs share, apart from method and teacher, that is not in the recipe.
        lines: the runs by row and value.
        published: the comparable published lines by row.
        compared: the values whose runs stay in the table of their setting, because it compares
            more methods than the study.
    """

    dataset: str
    pair: Pair | None
    key: str
    setting: Settings
    lines: Lines
    published: Mapping[RowKey, tuple[PublishedLine, ...]] = field(default_factory=dict)
    compared: frozenset[Value] = frozenset()

    @property
    def setting_title(self) -> str:
        """The setting as text."""
        return settings_text(self.setting) or "the recipe"

    @property
    def pair_name(self) -> str:
        """The pair as text."""
        return NETWORKS if self.pair is None else "-".join(self.pair)

    @property
    def values(self) -> tuple[Value, ...]:
        """All measured and published values: numbers by size, names by the alphabet."""
        found = {value for cells in self.lines.values() for value in cells}
        published = (line for lines in self.published.values() for line in lines)
        return _sorted(found.union(*(line.top1 for line in published)))

    @property
    def is_numeric(self) -> bool:
        """Whether the values are numbers."""
        return all(isinstance(value, float) for value in self.values)

    @property
    def recipe_value(self) -> Value | None:
        """The recipe's own value; None if no run has it or methods have different ones."""
        found = {
            value
            for cells in self.lines.values()
            for value, runs in cells.items()
            if any(not changes(run, self.key) for run in runs)
        }
        return found.pop() if len(found) == 1 else None

    def runs(self) -> Iterator[FinishedRun]:
        """Yield all runs of all lines."""
        return (run for cells in self.lines.values() for runs in cells.values() for run in runs)

    def moved(self) -> Iterator[FinishedRun]:
        """Yield the runs that no table of a setting shows as well."""
        for cells in self.lines.values():
            for value, runs in cells.items():
                if value not in self.compared:
                    yield from (run for run in runs if changes(run, self.key))


def find_studies(results: Sequence[FinishedRun]) -> list[Study]:
    """Return the studies among ``results``, sorted by dataset, pair, setting and key."""
    lines = _Lines(results)
    for run in results:
        lines.add(run)
    found = [study for place in lines.by_place for study in _studies(place, lines)]
    shared = {(s.dataset, s.pair[1], s.key, s.setting) for s in found if s.pair is not None}
    found += _network_studies(lines, shared)
    return sorted(map(_name_grid, _without_points_of_others(found)), key=_order)


def _order(study: Study) -> tuple[object, ...]:
    """Return the key that sorts studies; those of networks alone come last."""
    return (
        study.dataset,
        study.pair is None,
        study.pair or (),
        numeric_order(study.setting),
        study.key,
    )


def moved_runs(studies: Iterable[Study]) -> set[Path]:
    """Return the folders of the runs that studies show instead of the tables of their settings.

    Runs with the recipe's own value of the setting stay in their tables too.
    """
    return {run.folder for study in studies for run in study.moved()}


def changes(run: FinishedRun, key: str) -> bool:
    """Return whether the run has another value of ``key`` than the recipe."""
    return key in dict(run.difference)


class _Lines:
    """The runs of all possible studies by place and row."""

    def __init__(self, results: Iterable[FinishedRun]) -> None:
        self.by_place: dict[Place, dict[RowKey, dict[Value, list[FinishedRun]]]] = {}
        self.alone: dict[Place, dict[RowKey, dict[Value, list[FinishedRun]]]] = {}
        self._complete: set[tuple[object, ...]] = set()
        self._runs: dict[tuple[object, ...], list[FinishedRun]] = {}
        for run in results:
            self._runs.setdefault(_identity(run, run.difference), []).append(run)

    def add(self, run: FinishedRun) -> None:
        """Add ``run``, and the runs with the recipe's value, to the lines that it is part of."""
        if len(run.difference) > MOST_KEYS:
            return
        for key, text in run.difference:
            if not _is_studied(key, text):
                continue
            rest = without(run.difference, key)
            cells = self._cells(run, key, rest)
            cells.setdefault(as_value(text), []).append(run)
            line = (key, *_identity(run, rest))
            if line in self._complete:
                continue
            self._complete.add(line)
            for base in self._bases(run, key, rest):
                own = recipe_value(base, key)
                if own is not None and _is_studied(key, own):
                    cells.setdefault(as_value(own), []).append(base)

    def _cells(self, run: FinishedRun, key: str, rest: Settings) -> dict[Value, list[FinishedRun]]:
        setting = tuple(item for item in rest if not item[0].startswith(ROW_KEYS))
        variant = tuple(item for item in rest if item[0].startswith(ROW_KEYS))
        if run.teacher is None:
            place: Place = (run.dataset, None, key, setting)
            how = () if run.method == ALONE else (("method", run.method),)
            return self.alone.setdefault(place, {}).setdefault((run.student, how + variant), {})
        place = (run.dataset, (run.teacher, run.student), key, setting)
        source = source_of(run.dataset)
        row: RowKey = (display_name(run.method), variant)
        if published := published_row(source, run, key):
            row = (published, tuple(item for item in variant if item[0] == DIGEST))
        return self.by_place.setdefault(place, {}).setdefault(row, {})

    def _bases(self, run: FinishedRun, key: str, rest: Settings) -> Iterator[FinishedRun]:
        """Yield the runs that differ from ``run`` in the recipe's value of ``key`` alone."""
        yield from self._runs.get(_identity(run, rest), ())
        epochs = dict(rest).get(TEACHER_EPOCHS)
        if key == EPOCHS and epochs is not None:
            # A run as long as its teacher's does not record the teacher's length.
            for base in self._runs.get(_identity(run, without(rest, TEACHER_EPOCHS)), ()):
                if recipe_value(base, key) == epochs:
                    yield base


def _identity(run: FinishedRun, difference: Settings) -> tuple[object, ...]:
    return run.dataset, run.teacher, run.student, run.method, difference


def _is_studied(key: str, text: str) -> bool:
    """Return whether ``text`` is a number or, for a setting of the method, a name."""
    if key in NOT_STUDIED or key == DIGEST:
        return False
    if isinstance(as_value(text), float):
        return True
    is_name = re.fullmatch(r"[A-Za-z]\w*", text) is not None
    return key.startswith(METHOD) and is_name and text not in ("true", "false", "null")


def _studies(place: Place, lines: _Lines) -> Iterator[Study]:
    """Yield the study of ``place``, if its runs are one."""
    dataset, pair, key, setting = place
    assert pair is not None
    found = dict(lines.by_place[place])
    digests = {dict(variant).get(DIGEST) for _, variant in found}
    if len(digests) == 1:  # the only teacher need not set rows apart
        found = {(name, without_digest(variant)): cells for (name, variant), cells in found.items()}
    split = {
        row: cells for name, both in found.items() for row, cells in _by_teacher(key, name, both)
    }
    alone = lines.alone.get((dataset, None, key, setting), {}).get((pair[1], ()))
    if alone:
        split[STUDENT] = alone
    kept, compared = _without_comparisons(key, _kept(key, split))
    if not kept:
        return
    published = {
        row: tuple(comparable_lines(dataset, key, setting, _all(cells)))
        for row, cells in kept.items()
        if row != STUDENT
    }
    study = Study(dataset, pair, key, setting, lines=_ordered(dataset, kept), published=published)
    yield replace(study, compared=compared)


def _without_points_of_others(studies: Sequence[Study]) -> Iterator[Study]:
    """Yield the studies without the single values that are part of a line of another study."""
    in_lines = {
        run.folder
        for study in studies
        for cells in study.lines.values()
        if len(cells) > 1
        for run in _all(cells)
    }
    for study in studies:
        lines = {
            row: cells
            for row, cells in study.lines.items()
            if len(cells) > 1 or not in_lines.issuperset(run.folder for run in _all(cells))
        }
        yield replace(study, lines=lines)


def _name_grid(study: Study) -> Study:
    """Return ``study`` with rows that have the other value of a grid of two settings.

    The rows of a method are a grid if all but the recipe's have a number of one other setting.
    """
    names = {row: row for row in study.lines}
    for name in {name for name, _ in names}:
        found = [row for row in names if row[0] == name]
        keys = {key for _, variant in found for key, _ in variant}
        if len(found) < 2 or len(keys) != 1 or DIGEST in keys:
            continue
        (key,) = keys
        own = {row: recipe_value(_all(study.lines[row])[0], key) for row in found}
        values = {row: as_value(dict(row[1]).get(key) or own[row] or "") for row in found}
        are_numbers = all(isinstance(value, float) for value in values.values())
        if are_numbers and len({*values.values()}) == len(found):
            names |= {row: (name, ((key, value_text(value)),)) for row, value in values.items()}
    return replace(
        study,
        lines=_ordered(study.dataset, {names[row]: cells for row, cells in study.lines.items()}),
        published={names[row]: found for row, found in study.published.items() if row in names},
    )


def _network_studies(lines: _Lines, shared: set[tuple[str, str, str, Settings]]) -> Iterator[Study]:
    """Yield the studies of networks alone; those of ``shared`` are in the studies of pairs."""
    for (dataset, _, key, setting), rows in lines.alone.items():
        left = {
            row: cells
            for row, cells in rows.items()
            if row[1] or (dataset, row[0], key, setting) not in shared
        }
        kept, compared = _without_comparisons(key, _kept(key, left))
        if kept:
            study = Study(dataset, None, key, setting, lines=_ordered(dataset, kept))
            yield replace(study, compared=compared)


def _kept(key: str, rows: Rows) -> Rows:
    """Return ``rows`` if at least one has enough values for a study, else nothing."""
    needed = MIN_PUBLISHED if key in studied_keys() else MIN_VALUES
    numbers = any(isinstance(value, float) for cells in rows.values() for value in cells)
    kept = {
        row: {value: runs for value, runs in cells.items() if isinstance(value, float) == numbers}
        for row, cells in rows.items()
    }
    kept = {row: cells for row, cells in kept.items() if cells}
    return kept if any(len(cells) >= needed for cells in kept.values()) else {}


def _without_comparisons(key: str, rows: Rows) -> tuple[Rows, frozenset[Value]]:
    """Return ``rows`` without those of comparisons, and the values of these.

    If more methods have a value as their only one than have it among several, the setting with that
    value is a comparison of methods. It keeps its table, and these methods are not in the study. A
    variant with one value is not in the study either if its method has a line. Settings of methods
    have no tables.
    """
    if key.startswith(ROW_KEYS):
        return rows, frozenset()
    single = {row: next(iter(cells)) for row, cells in rows.items() if len(cells) == 1}
    studied = {row[0]: cells for row, cells in rows.items() if row not in single}
    several = Counter(value for cells in studied.values() for value in cells)
    others = {(row[0], value) for row, value in single.items() if row[0] not in {*studied}}
    alone = Counter(value for name, value in others if name != STUDENT[0])
    compared = frozenset(value for value, count in alone.items() if count > several[value])
    kept = {
        row: cells
        for row, cells in rows.items()
        if row not in single or (single[row] not in compared and row[0] not in studied)
    }
    return kept, compared


def _by_teacher(
    key: str, row: RowKey, cells: Mapping[Value, Sequence[FinishedRun]]
) -> Iterator[tuple[RowKey, Mapping[Value, Sequence[FinishedRun]]]]:
    """Yield the line, or a line for each teacher if teachers of different weights share it.

    A schedule or an optimizer may be the teacher's too, so one teacher for each value is a line.
    """
    name, variant = row
    by_cell = [{run.origin.teacher for run in runs} - {None} for runs in cells.values()]
    digests = set().union(*by_cell)
    follows = not key.startswith(("dataset.", METHOD)) and all(len(each) < 2 for each in by_cell)
    if len(digests) < 2 or follows or DIGEST in dict(variant):
        yield row, cells
        return
    recorded = {run.origin.teacher for run in _all(cells)}
    for digest in sorted(recorded, key=str):
        own = {
            value: left
            for value, runs in cells.items()
            if (left := [run for run in runs if run.origin.teacher == digest])
        }
        yield (name, tuple(sorted((*variant, (DIGEST, digest or "unknown"))))), own


def _all(cells: Mapping[Value, Sequence[FinishedRun]]) -> list[FinishedRun]:
    return [run for runs in cells.values() for run in runs]


def _ordered(dataset: str, rows: Mapping[RowKey, Mapping[Value, Sequence[FinishedRun]]]) -> Lines:
    source = source_of(dataset)
    names = source.all_rows if source else ROWS
    order = sorted(rows, key=lambda row: row_order(row, names))
    return {row: {value: tuple(rows[row][value]) for value in _sorted(rows[row])} for row in order}


def _sorted(values: Iterable[Value]) -> tuple[Value, ...]:
    """Return numbers by size; names, which a study never mixes with numbers, by the alphabet."""
    return tuple(sorted(values, key=lambda value: (isinstance(value, str), value)))
