"""Rows of a table of measured networks: one for each experiment, over its seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from sskd.measuring.selection import Chosen
from sskd.report.groups import ALONE, mean_std_n
from sskd.report.published import (
    ROWS,
    STUDENT_ROW,
    RowKey,
    display_name,
    published_for,
    row_label,
    settings_text,
)
from sskd.report.results import DIGEST, FinishedRun, without_digest
from sskd.report.tables import Cell, Table

ALONE_ROW, STUDENT_ALONE = "alone", "student alone"
GROUP_OF_KEY = re.compile(r"\b(?:\w+\.)+(?=\w+=)")
_ORDER = (ALONE_ROW, STUDENT_ALONE, *ROWS)


class Row(NamedTuple):
    """An experiment: the data and the setting of its training, its networks, and its method."""

    dataset: str
    setting: str
    networks: str
    method: str


@dataclass(frozen=True)
class Measured:
    """What was measured of one network.

    Attributes:
        name: the name of the network, from its path.
        row: its row of the table.
        run: the run that trained it; None for a file.
        values: the measured values by name.
    """

    name: str
    row: Row
    run: FinishedRun | None
    values: Mapping[str, Any]


M = TypeVar("M", bound=Measured)


def by_row(measured: Sequence[M]) -> Iterator[tuple[Row, list[M]]]:
    """Yield the rows in their order, each with its networks."""
    for row in sorted({each.row for each in measured}, key=row_order):
        yield row, [each for each in measured if each.row == row]


def records(measured: Sequence[Measured], values: str) -> list[dict[str, Any]]:
    """Return what was measured of each network, for a JSON file, under the key ``values``."""
    return [
        {"name": each.name, **each.row._asdict(), "seed": each.run and each.run.seed}
        | {values: dict(each.values)}
        for each in measured
    ]


def rows_of(networks: Sequence[tuple[Chosen, str]]) -> list[Row]:
    """Return the row of each network.

    Args:
        networks: each with the name of its architecture, which only a file needs.
    """
    several = _pairs_of_several_teachers(each.run for each, _ in networks if each.run)
    return [
        _row_of(each.run, digest=(each.run.teacher, each.run.student) in several)
        if each.run
        else Row("", "", architecture, each.name)
        for each, architecture in networks
    ]


def _row_of(run: FinishedRun, *, digest: bool) -> Row:
    """Return the row of ``run``.

    Only with ``digest`` the row has the digest of its teacher's weights, which separates the
    students of several teachers of one name.
    """
    pair = f"{run.teacher}-{run.student}" if run.teacher else run.student
    name = ALONE_ROW if run.method == ALONE else display_name(run.method)
    teacher = [(DIGEST, run.origin.teacher or "unknown")] * digest
    key: RowKey = (name, tuple(sorted([*without_digest(run.variant), *teacher])))
    return Row(run.dataset, settings_text(run.setting), pair, row_label(key))


def _pairs_of_several_teachers(runs: Iterable[FinishedRun]) -> set[tuple[str | None, str]]:
    """Return the pairs whose students had teachers of different weights."""
    found: dict[tuple[str | None, str], set[str]] = {}
    for run in runs:
        digests = found.setdefault((run.teacher, run.student), set())
        if run.origin.teacher is not None:
            digests.add(run.origin.teacher)
    return {pair for pair, digests in found.items() if len(digests) > 1}


def row_order(row: Row) -> tuple[object, ...]:
    """Return the key that sorts rows as the report does."""
    name = row.method.partition(" (")[0]
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return row.dataset, row.setting, row.networks, place, row.method.casefold()


def row_columns(rows: Sequence[Row]) -> dict[str, list[Cell]]:
    """Return the columns that name ``rows``; what is the same for all of them has none."""
    columns = {
        "trained on": [row.dataset for row in rows],
        "setting": [row.setting for row in rows],
        "networks": [row.networks for row in rows],
        "row": [row.method for row in rows],
    }
    for name in ("trained on", "setting"):
        if len(set(columns[name])) == 1:
            del columns[name]
    return {name: [Cell(text) for text in texts] for name, texts in columns.items()}


def table_of(title: str, columns: Mapping[str, list[Cell]], notes: Sequence[str]) -> Table:
    """Return the table with these columns, of which the first are ``row_columns``."""
    return Table(
        title=title,
        header=tuple(columns),
        rows=tuple(zip(*columns.values(), strict=True)),
        labels=list(columns).index("row") + 1,
        align=">",
        notes=tuple(notes),
    )


def setting_notes(rows: Sequence[Row], networks: str) -> list[str]:
    """Return a note on the setting that all ``rows`` share, if it is not the recipe's.

    ``networks`` is what the note calls the networks of the rows.
    """
    settings = {row.setting for row in rows}
    common = settings if len(settings) == 1 else set()
    return [f"The {networks} were trained with {text}." for text in common if text]


def picture_labels(rows: Sequence[Row], always: Sequence[str]) -> list[str]:
    """Return the names of ``rows`` in a picture: the fields ``always``, and what differs.

    There is little space, so settings are named by the last part of their keys.
    """
    # Files, which have neither a dataset nor a setting, are no reason to show those of the runs.
    different = [
        name for name in Row._fields if len({getattr(row, name) for row in rows} - {""}) > 1
    ]
    names = [
        name
        for name in ("networks", "method", "setting", "dataset")
        if name in {*always, *different}
    ]
    short = [row._replace(setting=GROUP_OF_KEY.sub("", row.setting)) for row in rows]
    return [" ".join(filter(None, (getattr(row, name) for name in names))) for row in short]


def is_published(run: FinishedRun, row: str) -> bool:
    """Return whether ``run`` is the experiment of the published ``row`` of SSKD's paper."""
    published = published_for(run.dataset)
    if not published or not published[0].is_comparable(run.setting):
        return False
    alone = run.teacher is None and not run.variant and run.method == ALONE
    return alone if row == STUDENT_ROW else published[0].is_same_experiment(row, run)


def mean_cell(values: Sequence[float], digits: int, *, count: bool = False) -> Cell:
    """Return a cell with the mean of ``values`` and their sample standard deviation."""
    if not values:
        return Cell()
    mean, std, n = mean_std_n(values)
    deviation = "" if std is None else f" ± {std:.{digits}f}"
    return Cell(f"{mean:.{digits}f}{deviation}" + f" ({n})" * count, mean)


def value_cell(value: float | None, digits: int) -> Cell:
    """Return a cell with a published value; an empty one for None."""
    return Cell() if value is None else Cell(f"{value:.{digits}f}", value)
