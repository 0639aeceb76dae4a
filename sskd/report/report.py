"""The report of a folder of runs: what was read, and what is derived from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sskd.report.disambiguation import distinct_results
from sskd.report.groups import Group, MissingCell, build_groups, find_missing
from sskd.report.render import render_csv
from sskd.report.results import Epoch, FinishedRun, Warn, read_results
from sskd.report.status import JobStatus, read_jobs
from sskd.report.studies import Study, find_studies, moved_runs
from sskd.report.study_tables import build_study_tables
from sskd.report.tables import Table, build_tables, notes_once
from sskd.report.terms import Terms, build_terms_tables, find_terms, moved_term_runs


@dataclass(frozen=True)
class Report:
    """A folder of runs: the results, and the state of the jobs."""

    runs: Path
    results: list[FinishedRun]
    jobs: list[JobStatus]

    @cached_property
    def studies(self) -> list[Study]:
        """The studies among the results."""
        return find_studies(self.results)

    @cached_property
    def terms(self) -> list[Terms]:
        """The runs of SSKD's terms."""
        return find_terms(self.results)

    @cached_property
    def grouped_results(self) -> list[FinishedRun]:
        """The results that are shown by setting: those that only studies show are left out."""
        moved = moved_runs(self.studies) | moved_term_runs(self.terms)
        return [run for run in self.results if run.folder not in moved]

    def groups(self, epoch: Epoch = "last") -> list[Group]:
        """Return the groups that have distilled students, by setting and source."""
        settings = build_groups(self.grouped_results, epoch)
        return [group for groups in settings for group in groups if group.distilled]

    def tables(self, epoch: Epoch) -> list[Table]:
        """Return all tables, at the last or at the best epoch: by setting, then the studies."""
        by_setting = build_tables(self.grouped_results, epoch)
        terms = [table for each in self.terms for table in build_terms_tables(each, epoch)]
        return notes_once([*by_setting, *terms, *build_study_tables(self.studies, epoch)])

    def csv(self) -> str:
        """Return the entries of all tables, at both epochs, as CSV."""
        tables = [*self.tables("last"), *self.tables("best")]
        return render_csv(entry for table in tables for entry in table.entries)

    def unfinished(self) -> list[JobStatus]:
        """Return the jobs without a result: running, queued, stopped, interrupted, failed."""
        return [job for job in self.jobs if job.state != "finished"]

    def missing(self) -> list[MissingCell]:
        """Return the published cells that have neither a result nor an unfinished run."""
        runs = self.runs.resolve()
        return find_missing(self.groups(), (runs / job.folder for job in self.unfinished()))


def read_report(runs: Path, warn: Warn) -> Report:
    """Read the runs under ``runs``. Each malformed file is reported through ``warn`` in a line."""
    if not runs.is_dir():
        return Report(runs, [], [])
    results = distinct_results(read_results(runs, warn), warn)
    return Report(runs, results, read_jobs(runs, warn))
