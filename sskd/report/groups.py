"""Group the results of many runs, and the figures of each group."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sskd.report.published import Pair, Published, is_comparable, published_for
from sskd.report.result import DIGEST, Epoch, Result, Settings, without_digest
from sskd.report.rows import (
    ROWS,
    STUDENT,
    TEACHER,
    RowKey,
    display_name,
    row_label,
    settings_text,
)

NETWORKS_TABLE = "networks"


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
    """The runs of one dataset in one setting that share their tables.

    With published figures, they are the runs that were made as those were and, of the
    dataset's first source, all that were made as no figures were. ``shared`` are the networks
    trained from scratch, which every group of the setting has.
    """

    dataset: str
    setting: Settings
    distilled: tuple[Result, ...]
    shared: tuple[Result, ...]
    epoch: Epoch
    published: Published | None

    @property
    def setting_title(self) -> str:
        """The setting in words."""
        return settings_text(self.setting) or "the recipe"

    @property
    def title(self) -> str:
        """The dataset, the setting and, if its name tells it apart, the source."""
        source = self.published.name if self.published else ""
        return " · ".join(filter(None, (self.dataset, self.setting_title, source)))

    def pairs(self) -> set[Pair]:
        """Return the (teacher, student) pairs that have a distilled student."""
        return {(run.teacher, run.student) for run in self.distilled if run.teacher is not None}

    def pairs_by_table(self) -> dict[str, list[Pair]]:
        """Return the pairs of each table: those published in the printed order, then others."""
        present = self.pairs()
        published = self.published.tables if self.published else {}
        tables = {
            name: [pair for pair in pairs if pair in present] for name, pairs in published.items()
        }
        others = "other pairs" if published else "pairs"
        if self.published and self.published.name:
            others = f"{self.published.name}, {others}"
        tables[others] = sorted(present.difference(*tables.values()))
        return {name: pairs for name, pairs in tables.items() if pairs}

    def layout(self, table: str) -> tuple[str, ...]:
        """Return the rows that ``table`` has as published; elsewhere empty rows say nothing."""
        return self.published.rows if self.published and table in self.published.tables else ()

    def pair_runs(self, pair: Pair) -> dict[RowKey, list[Result]]:
        """Return the pair's students by row, in order: the network alone, then each method."""
        rows = {STUDENT: _plain_scratch(self.shared, pair[1])}
        distilled = [run for run in self.distilled if (run.teacher, run.student) == pair]
        # A teacher from elsewhere sets nothing apart as long as it is the pair's only one.
        one_teacher = len({dict(run.variant).get(DIGEST) for run in distilled}) == 1
        for run in distilled:
            variant = self._variant(run)
            key = (display_name(run.method), without_digest(variant) if one_teacher else variant)
            rows.setdefault(key, []).append(run)
        apart = {key: runs for row, of in rows.items() for key, runs in _by_teacher(row, of)}
        return {key: apart[key] for key in sorted(apart, key=self.row_order) if apart[key]}

    def pair_entries(self, table: str, pair: Pair) -> dict[RowKey, Entry]:
        """Return the figures of one column by row, the teacher's first."""
        rows = self.pair_runs(pair)
        values = {TEACHER: _teacher_top1(self, pair)}
        values |= {key: [run.top1(self.epoch) for run in runs] for key, runs in rows.items()}
        rows[TEACHER] = _students_of_elsewhere(self, pair)
        published = {key: self._published_top1(pair, key, rows[key]) for key in values}
        return {
            key: self._entry(table, pair, key, values[key], published[key])
            for key in values
            if values[key]
        }

    def row_order(self, row: RowKey) -> tuple[int, str, Settings]:
        """Return the key that sorts rows as published, other methods after them."""
        name, variant = row
        rows = self.published.rows if self.published else ROWS
        return rows.index(name) if name in rows else len(rows), name, variant

    def network_runs(self, shown: Iterable[str]) -> dict[RowKey, list[Result]]:
        """Return the runs from scratch by network, but for the plain ones of ``shown``."""
        rows: dict[RowKey, list[Result]] = {}
        for run in self.shared:
            if run.variant or run.student not in shown:
                rows.setdefault((run.student, run.variant), []).append(run)
        return {key: rows[key] for key in sorted(rows)}

    def network_entries(self, runs: dict[RowKey, list[Result]]) -> dict[RowKey, Entry]:
        """Return the figures of ``network_runs``."""
        comparable = self.published and is_comparable(self.setting)
        alone = self.published.alone if self.published and comparable else {}
        return {
            (name, variant): self._entry(
                NETWORKS_TABLE,
                ("", name),
                (name, variant),
                [run.top1(self.epoch) for run in found],
                None if variant else alone.get(name),
            )
            for (name, variant), found in runs.items()
        }

    def _variant(self, run: Result) -> Settings:
        """Return what sets the run apart in this group: nothing, if it was made as published."""
        if self.published and self.published.holds(display_name(run.method), run):
            return tuple(item for item in run.variant if item[0] == DIGEST)
        return run.variant

    def _published_top1(self, pair: Pair, row: RowKey, runs: Iterable[Result]) -> float | None:
        if self.published is None or not is_comparable(self.setting):
            return None
        name, _ = row
        if row == TEACHER:
            same = all(self.published.has_its_teacher(name, run) for run in runs)
        else:
            # Of runs from one file that differ only in the epoch asked for, one is enough.
            same = row == STUDENT or any(self.published.compares(name, run) for run in runs)
        return self.published.top1.get((*pair, name)) if same else None

    def _entry(
        self, table: str, pair: Pair, row: RowKey, values: Sequence[float], published: float | None
    ) -> Entry:
        place = (self.dataset, self.setting_title, table, *pair, row_label(row))
        return Entry(*place, self.epoch, *spread(values), published)


def build_groups(results: Iterable[Result], epoch: Epoch) -> Iterator[list[Group]]:
    """Yield the groups of each dataset's each setting, the unchanged recipe first."""
    by_setting: dict[tuple[str, Settings], list[Result]] = {}
    for run in results:
        by_setting.setdefault((run.dataset, run.setting), []).append(run)
    for dataset, setting in sorted(by_setting):
        runs = by_setting[dataset, setting]
        shared = tuple(run for run in runs if run.teacher is None)
        sources: tuple[Published | None, ...] = published_for(dataset) or (None,)
        distilled: list[list[Result]] = [[] for _ in sources]
        for run in runs:
            if run.teacher is not None:
                distilled[_source_of(run, sources)].append(run)
        yield [
            Group(dataset, setting, tuple(own), shared, epoch, source)
            for source, own in zip(sources, distilled, strict=True)
        ]


def spread(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Return the mean, the sample standard deviation (None for one value) and the count."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), deviation, len(values)


def _source_of(run: Result, sources: Sequence[Published | None]) -> int:
    row = display_name(run.method)
    made_as = (index for index, source in enumerate(sources) if source and source.holds(row, run))
    return next(made_as, 0)


def _by_teacher(row: RowKey, runs: list[Result]) -> Iterator[tuple[RowKey, list[Result]]]:
    """Yield ``row``, or a row for each teacher if its runs had teachers of other weights.

    A teacher of the suite that was trained again has the name of the one before it.
    """
    name, variant = row
    digests = {run.origin.teacher for run in runs}
    if DIGEST in dict(variant) or len(digests - {None}) < 2:
        yield row, runs
        return
    for digest in digests:
        key = (name, tuple(sorted((*variant, (DIGEST, digest or "unknown")))))
        yield key, [run for run in runs if run.origin.teacher == digest]


def _teacher_top1(group: Group, pair: Pair) -> list[float]:
    trained = [run.top1(group.epoch) for run in _plain_scratch(group.shared, pair[0])]
    # A teacher from elsewhere has no run here, but its students have measured it.
    measured = {run.teacher_top1 for run in _students_of_elsewhere(group, pair)}
    return trained or sorted(value for value in measured if value is not None)


def _students_of_elsewhere(group: Group, pair: Pair) -> list[Result]:
    """Return the students that say which teacher the pair has, if it was not trained here."""
    if _plain_scratch(group.shared, pair[0]):
        return []
    return [run for run in group.distilled if (run.teacher, run.student) == pair]


def _plain_scratch(runs: Iterable[Result], network: str) -> list[Result]:
    return [run for run in runs if run.student == network and not run.variant]
