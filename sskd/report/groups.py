"""Group the results of many runs, and the figures of each group."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sskd.report.published import Pair, Published
from sskd.report.results import Epoch, Result, Settings

# The published order of rows; other methods follow in alphabetical order.
ROWS = (
    *("teacher", "student", "KD", "FitNet", "AT", "SP", "VID"),
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
NETWORKS_TABLE = "networks"
DIGEST = "teacher.digest"

# A row: its name, and what sets its runs apart from the plain row of that name.
RowKey = tuple[str, Settings]
TEACHER: RowKey = ("teacher", ())
STUDENT: RowKey = ("student", ())


@dataclass(frozen=True)
class Entry:
    """One figure of a table: top-1 in percent over ``n`` runs, beside the published one."""

    dataset: str
    setting: str
    table: str
    teacher: str
    student: str
    row: str
    epoch: Epoch
    mean: float
    std: float | None
    n: int
    published: float | None

    @property
    def difference(self) -> float | None:
        """Ours minus the published figure."""
        return None if self.published is None else self.mean - self.published


@dataclass(frozen=True)
class Group:
    """The runs of one dataset in one setting."""

    dataset: str
    setting: Settings
    runs: tuple[Result, ...]
    epoch: Epoch
    published: Published | None

    @property
    def setting_title(self) -> str:
        """The setting in words."""
        return settings_text(self.setting) or "the recipe"

    def pairs(self) -> set[Pair]:
        """Return the (teacher, student) pairs that have a distilled student."""
        return {(run.teacher, run.student) for run in self.runs if run.teacher is not None}

    def pair_runs(self, pair: Pair) -> dict[RowKey, list[Result]]:
        """Return the pair's students by row, in order: the network alone, then each method."""
        rows = {STUDENT: self._plain_scratch(pair[1])}
        distilled = [run for run in self.runs if (run.teacher, run.student) == pair]
        # A teacher from elsewhere sets nothing apart as long as it is the pair's only one.
        one_teacher = len({dict(run.variant).get(DIGEST) for run in distilled}) == 1
        for run in distilled:
            variant = without_digest(run.variant) if one_teacher else run.variant
            rows.setdefault((display_name(run.method), variant), []).append(run)
        return {key: rows[key] for key in sorted(rows, key=row_order) if rows[key]}

    def pair_entries(self, table: str, pair: Pair) -> dict[RowKey, Entry]:
        """Return the figures of one column by row, the teacher's first."""
        rows = self.pair_runs(pair)
        values = {TEACHER: self._teacher_top1(pair)}
        values |= {key: [run.top1(self.epoch) for run in runs] for key, runs in rows.items()}
        top1 = self.published.top1 if self.published else {}
        return {
            key: self._entry(table, pair, key, values[key], top1.get((*pair, key[0])))
            for key in values
            if values[key]
        }

    def network_runs(self) -> dict[RowKey, list[Result]]:
        """Return the runs from scratch that no pair's column shows, by network."""
        shown = {network for pair in self.pairs() for network in pair}
        rows: dict[RowKey, list[Result]] = {}
        for run in self.runs:
            if run.teacher is None and (run.variant or run.student not in shown):
                rows.setdefault((run.student, run.variant), []).append(run)
        return {key: rows[key] for key in sorted(rows)}

    def network_entries(self) -> dict[RowKey, Entry]:
        """Return the figures of ``network_runs``."""
        alone = self.published.alone if self.published else {}
        entries = {}
        for key, runs in self.network_runs().items():
            values = [run.top1(self.epoch) for run in runs]
            pair = ("", key[0])
            entries[key] = self._entry(NETWORKS_TABLE, pair, key, values, alone.get(key[0]))
        return entries

    def _plain_scratch(self, network: str) -> list[Result]:
        return [
            run
            for run in self.runs
            if run.teacher is None and run.student == network and not run.variant
        ]

    def _teacher_top1(self, pair: Pair) -> list[float]:
        trained = [run.top1(self.epoch) for run in self._plain_scratch(pair[0])]
        # A teacher from elsewhere has no run here, but its students have measured it.
        measured = {run.teacher_top1 for run in self.runs if (run.teacher, run.student) == pair}
        return trained or sorted(value for value in measured if value is not None)

    def _entry(
        self, table: str, pair: Pair, row: RowKey, values: Sequence[float], published: float | None
    ) -> Entry:
        place = (self.dataset, self.setting_title, table, *pair, row_label(row))
        return Entry(*place, self.epoch, *spread(values), published)


def display_name(method: str) -> str:
    """Return the name of ``method`` as the papers write it."""
    return DISPLAY_NAMES.get(method, method.upper())


def without_digest(settings: Settings) -> Settings:
    """Return ``settings`` without the digest of the teacher's weights."""
    return tuple((key, value) for key, value in settings if key != DIGEST)


def settings_text(settings: Settings) -> str:
    """Return settings as ``key=value, key=value``; a digest is cut to its first 8 digits."""
    return ", ".join(f"{key}={value[:8] if key == DIGEST else value}" for key, value in settings)


def row_label(row: RowKey) -> str:
    """Return a row's name, followed by what sets its runs apart."""
    name, variant = row
    return f"{name} ({settings_text(variant)})" if variant else name


def row_order(row: RowKey) -> tuple[int, str, Settings]:
    """Return the key that sorts rows as published, other methods after them."""
    name, variant = row
    return ROWS.index(name) if name in ROWS else len(ROWS), name, variant


def spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Return the mean, the sample standard deviation (None for one value) and the count."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), deviation, len(values)
