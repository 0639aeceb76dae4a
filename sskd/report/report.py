"""All that a report is made from, and what can be made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sskd.report.cells import Cell, read_cells
from sskd.report.groups import Group, build_groups
from sskd.report.missing import MissingCell, find_missing
from sskd.report.render import render_csv
from sskd.report.result import Epoch, Result
from sskd.report.results import read_results
from sskd.report.tables import Table, build_tables


@dataclass(frozen=True)
class Report:
    """A folder of runs: its results, and the state of its cells."""

    runs: Path
    results: list[Result]
    cells: list[Cell]

    def groups(self, epoch: Epoch = "last") -> list[Group]:
        """Return the groups of runs that have tables of pairs, by setting and source."""
        settings = build_groups(self.results, epoch)
        return [group for groups in settings for group in groups if group.distilled]

    def tables(self, epoch: Epoch) -> list[Table]:
        """Return all tables, at the last or at the best epoch."""
        return build_tables(self.results, epoch)

    def csv(self) -> str:
        """Return every figure of the tables, at both epochs, as CSV."""
        tables = [*self.tables("last"), *self.tables("best")]
        return render_csv(entry for table in tables for entry in table.entries)

    def unfinished(self) -> list[Cell]:
        """Return the cells without a result: running, queued, stopped, interrupted, failed."""
        return [cell for cell in self.cells if cell.state != "finished"]

    def missing(self) -> list[MissingCell]:
        """Return the published cells that neither a result nor an unfinished run is for."""
        runs = self.runs.resolve()
        return find_missing(self.groups(), (runs / cell.folder for cell in self.unfinished()))


def read_report(runs: Path, warn: Callable[[str], None]) -> Report:
    """Read the runs under ``runs``; what cannot be read is told to ``warn``, a line each."""
    if not runs.is_dir():
        return Report(runs, [], [])
    return Report(runs, read_results(runs, warn), read_cells(runs, warn))
