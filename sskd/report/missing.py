"""The published cells that no run has filled, and none is about to fill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sskd.report.groups import Group
from sskd.report.published import STUDENT_ROW, TEACHER_ROW
from sskd.report.result import without_digest
from sskd.report.rows import display_name


@dataclass(frozen=True)
class MissingCell:
    """A published cell of a pair that has runs; ``setting`` is in words."""

    dataset: str
    setting: str
    table: str
    teacher: str
    student: str
    row: str


def find_missing(groups: Iterable[Group], unfinished: Iterable[Path]) -> list[MissingCell]:
    """Return the empty cells of the published pairs that have at least one student.

    A cell whose row has an unfinished run, told by the absolute folder, is not missing, in
    whatever setting that run is: a folder's name tells no more than that it is not the recipe's.
    """
    under_way = {_trained_in(folder) for folder in unfinished}
    return [
        cell
        for group in groups
        for cell in _empty_cells(group)
        if (cell.dataset, *_networks(cell)) not in under_way
    ]


def _empty_cells(group: Group) -> Iterator[MissingCell]:
    if group.published is None:
        return
    for table, pairs in group.pairs_by_table().items():
        for pair in pairs:
            entries = group.pair_entries(table, pair)
            filled = {name for name, variant in entries if not without_digest(variant)}
            for row in group.published.rows:
                if row not in filled and (*pair, row) in group.published.top1:
                    yield MissingCell(group.dataset, group.setting_title, table, *pair, row)


def _networks(cell: MissingCell) -> tuple[str, ...]:
    alone = {TEACHER_ROW: cell.teacher, STUDENT_ROW: cell.student}
    if cell.row in alone:
        return (alone[cell.row],)
    return f"{cell.teacher}-{cell.student}", cell.row


def _trained_in(folder: Path) -> tuple[str, ...]:
    """Return the dataset and what is trained, as the folder of a run names them."""
    match folder.parts:
        case (*_, dataset, "distill", pair, method, _):
            return dataset, pair, display_name(method)
        case (*_, dataset, "scratch", network, _):
            return dataset, network
    return ()
