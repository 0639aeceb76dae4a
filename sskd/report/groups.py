"""Group results into tables: the entry of each cell, gains, and missing cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sskd.report.later import TEACHER_METHOD
from sskd.report.published import (
    KD,
    ROWS,
    STUDENT,
    STUDENT_ROW,
    TEACHER,
    TEACHER_ROW,
    Pair,
    Published,
    RowKey,
    display_name,
    published_for,
    row_label,
    settings_text,
)
from sskd.report.recipe_values import recipe_value
from sskd.report.results import (
    DIGEST,
    Epoch,
    FinishedRun,
    Metric,
    Settings,
    numeric_order,
    without_digest,
)

NETWORKS_TABLE = "networks"
# That of sskd.config, which would import torch.
ALONE = "vanilla"
GAIN_LEGEND = (
    "Gain: the method's mean top-1 minus the mean of the student alone, or of KD, in points. Error"
    " bars: one standard deviation of that difference, the root of the sum of both sample"
    " variances over seeds; none if either side is a single run."
)
# Sorts rows: by their place in a layout, their names and their settings.
RowOrder = tuple[int, str, tuple[tuple[str, float, str], ...]]
REFERENCES = {STUDENT: "over the student alone", KD: "over KD"}


@dataclass(frozen=True)
class Entry:
    """The value of one cell: mean accuracy in percent over ``n`` runs, and the published value."""

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
    metric: Metric = "top1"

    @property
    def difference(self) -> float | None:
        """The mean minus the published value."""
        return None if self.published is None else self.mean - self.published


@dataclass(frozen=True, kw_only=True)
class Group:
    """The runs of one dataset, setting and published source, which share tables.

    Attributes:
        distilled: the students with the settings of ``published`` and, for the dataset's first
            source, those with the settings of no source.
        scratch_runs: the networks trained from scratch, the same in every group of the setting.
        published: the source; None if nothing is published for the dataset.
    """

    dataset: str
    setting: Settings
    distilled: tuple[FinishedRun, ...]
    scratch_runs: tuple[FinishedRun, ...]
    epoch: Epoch
    published: Published | None

    @property
    def setting_title(self) -> str:
        """The setting as text."""
        return settings_text(self.setting) or "the recipe"

    @property
    def title(self) -> str:
        """The dataset, the setting and the source, if that has a name."""
        source = self.published.name if self.published else ""
        return " · ".join(filter(None, (self.dataset, self.setting_title, source)))

    def pairs(self) -> set[Pair]:
        """Return the (teacher, student) pairs that have a distilled student."""
        return {(run.teacher, run.student) for run in self.distilled if run.teacher is not None}

    def pairs_by_table(self) -> dict[str, list[Pair]]:
        """Return the pairs of each table: published pairs in the printed order, then others."""
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
        """Return the rows that ``table`` always shows: those of a published table.

        Rows of later methods are shown if there are runs of them.
        """
        return self.published.rows if self.published and table in self.published.tables else ()

    def pair_runs(self, pair: Pair) -> dict[RowKey, list[FinishedRun]]:
        """Return the pair's students by row, in order: the network alone, then each method."""
        rows = {STUDENT: _plain_runs(self.scratch_runs, pair[1])}
        distilled = [run for run in self.distilled if (run.teacher, run.student) == pair]
        # If the pair has only one teacher from a file, its digest need not set rows apart.
        one_teacher = len({dict(run.variant).get(DIGEST) for run in distilled}) == 1
        for run in distilled:
            name, variant = self._row_of(run)
            key = (name, without_digest(variant) if one_teacher else variant)
            rows.setdefault(key, []).append(run)
        split = {key: runs for row, found in rows.items() for key, runs in _by_teacher(row, found)}
        return {key: split[key] for key in sorted(split, key=self.row_order) if split[key]}

    def pair_entries(self, table: str, pair: Pair, metric: Metric = "top1") -> dict[RowKey, Entry]:
        """Return the entries of one column by row, the teacher's first."""
        rows = self.pair_runs(pair)
        values = {TEACHER: _teacher_accuracies(self, pair, metric)}
        values |= {key: _accuracies(runs, metric, self.epoch) for key, runs in rows.items()}
        rows[TEACHER] = _students_of_untrained_teacher(self, pair)
        return {
            key: self.entry(
                table,
                pair,
                key,
                values=found,
                published=_published_value(self, pair, key, runs=rows[key], metric=metric),
                metric=metric,
            )
            for key, found in values.items()
            if found
        }

    def row_order(self, row: RowKey) -> RowOrder:
        """Return the key that sorts rows in the published order, other methods after them."""
        return row_order(row, self.published.all_rows if self.published else ROWS)

    def entry(
        self,
        table: str,
        pair: Pair,
        row: RowKey,
        *,
        values: Sequence[float],
        published: float | None,
        metric: Metric = "top1",
    ) -> Entry:
        """Return the entry of a cell whose runs have the accuracies ``values``."""
        place = (self.dataset, self.setting_title, table, *pair, row_label(row))
        return Entry(*place, self.epoch, *mean_std_n(values), published, metric=metric)

    def _row_of(self, run: FinishedRun) -> RowKey:
        """Return the run's row and the settings that set the run apart from others of that row."""
        if self.published and (row := self.published.row_of(run)):
            return row, tuple(item for item in run.variant if item[0] == DIGEST)
        own = _recipe_settings(self.published, run)
        return display_name(run.method), tuple(sorted((*own, *run.variant)))


def _recipe_settings(published: Published | None, run: FinishedRun) -> Settings:
    """Return the recipe's values that set ``run`` apart from the published row of its name.

    The published row has no settings in its label, even if its runs changed some. So a run with the
    recipe, which changed none, shows its values of these.
    """
    if published is None or any(not key.startswith("teacher.") for key, _ in run.variant):
        return ()
    changed = published.variants.get(display_name(run.method), ())
    values = ((key, recipe_value(run, key)) for key, _ in changed)
    return tuple((key, value) for key, value in values if value is not None)


def row_order(row: RowKey, rows: Sequence[str]) -> RowOrder:
    """Return the key that sorts rows as ``rows`` lists them, other methods after them."""
    name, variant = row
    place = rows.index(name) if name in rows else len(rows)
    return place, name.casefold(), numeric_order(variant)


def build_groups(results: Iterable[FinishedRun], epoch: Epoch) -> Iterator[list[Group]]:
    """Yield the groups of each dataset and setting, the unchanged recipe first."""
    by_setting: dict[tuple[str, Settings], list[FinishedRun]] = {}
    for run in results:
        by_setting.setdefault((run.dataset, run.setting), []).append(run)
    for dataset, setting in sorted(by_setting, key=lambda key: (key[0], numeric_order(key[1]))):
        runs = by_setting[dataset, setting]
        scratch_runs = tuple(run for run in runs if run.teacher is None)
        sources: tuple[Published | None, ...] = published_for(dataset, setting) or (None,)
        distilled: list[list[FinishedRun]] = [[] for _ in sources]
        for run in runs:
            if run.teacher is not None:
                distilled[_source_index(run, sources)].append(run)
        yield [
            Group(
                dataset=dataset,
                setting=setting,
                distilled=tuple(students),
                scratch_runs=scratch_runs,
                epoch=epoch,
                published=source,
            )
            for source, students in zip(sources, distilled, strict=True)
        ]


def network_runs(group: Group, shown: Iterable[str]) -> dict[RowKey, list[FinishedRun]]:
    """Return the runs from scratch by network, without the plain ones of the networks ``shown``.

    A network that another method than ``ALONE`` trained has a row of its own.
    """
    rows: dict[RowKey, list[FinishedRun]] = {}
    for run in group.scratch_runs:
        how = () if run.method == ALONE else (("method", run.method),)
        variant = (*how, *run.variant)
        if variant or run.student not in shown:
            rows.setdefault((run.student, variant), []).append(run)
    return {key: rows[key] for key in sorted(rows)}


def network_entries(
    group: Group, runs: Mapping[RowKey, Sequence[FinishedRun]]
) -> dict[RowKey, Entry]:
    """Return the entry of each row of ``network_runs``."""
    source = group.published
    alone = source.alone if source and source.is_comparable(group.setting) else {}
    return {
        (name, variant): group.entry(
            NETWORKS_TABLE,
            ("", name),
            (name, variant),
            values=[run.top1(group.epoch) for run in found],
            published=None if variant else alone.get(name),
        )
        for (name, variant), found in runs.items()
    }


def mean_std_n(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Return the mean, the sample standard deviation (None for one value) and the count."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return statistics.mean(values), deviation, len(values)


def _source_index(run: FinishedRun, sources: Sequence[Published | None]) -> int:
    """Return the index of a source with the run's settings, or 0.

    A source with a recipe of its own, which follows the others, has precedence.
    """
    found = [i for i, source in enumerate(sources) if source and source.row_of(run)]
    own = [i for i in found if (source := sources[i]) and source.setting]
    return next(iter(own or found), 0)


def _by_teacher(row: RowKey, runs: list[FinishedRun]) -> Iterator[tuple[RowKey, list[FinishedRun]]]:
    """Yield ``row``, or a row for each teacher if the runs had teachers of different weights.

    A teacher that this suite trained again has the same name as before.
    """
    name, variant = row
    digests = {run.origin.teacher for run in runs}
    if DIGEST in dict(variant) or len(digests - {None}) < 2:
        yield row, runs
        return
    for digest in digests:
        key = (name, tuple(sorted((*variant, (DIGEST, digest or "unknown")))))
        yield key, [run for run in runs if run.origin.teacher == digest]


def _accuracies(runs: Iterable[FinishedRun], metric: Metric, epoch: Epoch) -> list[float]:
    """Return the accuracies of those ``runs`` that recorded them."""
    return [value for run in runs if (value := run.accuracy(metric, epoch)) is not None]


def _teacher_accuracies(group: Group, pair: Pair, metric: Metric) -> list[float]:
    trained = _plain_runs(group.scratch_runs, pair[0])
    if trained:
        return _accuracies(trained, metric, group.epoch)
    # A teacher that was not trained here has no run, but its students have measured it.
    students = _students_of_untrained_teacher(group, pair)
    measured = {run.teacher_accuracy(metric) for run in students}
    return sorted(value for value in measured if value is not None)


def _published_value(
    group: Group, pair: Pair, row: RowKey, *, runs: Iterable[FinishedRun], metric: Metric
) -> float | None:
    """Return the published value of a cell; None if it may not be compared with its ``runs``."""
    published = group.published
    if published is None or not published.is_comparable(group.setting):
        return None
    name, _ = row
    if row == TEACHER:
        same = _is_published_teacher(group, published, pair[0], students=runs)
    else:
        # Runs of one teacher file can differ in the requested epoch; one match is enough.
        same = row == STUDENT or any(published.is_same_experiment(name, run) for run in runs)
    return published.value(pair, name, metric) if same else None


def _is_published_teacher(
    group: Group, published: Published, teacher: str, *, students: Iterable[FinishedRun]
) -> bool:
    """Return whether ``teacher`` is the published one; ``students`` had it if it has no runs."""
    trained = _plain_runs(group.scratch_runs, teacher)
    if not trained or not published.teachers_are_files:
        return all(published.has_teacher_of(TEACHER_ROW, run) for run in students)
    mean = statistics.mean(run.top1(group.epoch) for run in trained)
    return published.is_teacher_of(TEACHER_ROW, teacher, mean)


def _students_of_untrained_teacher(group: Group, pair: Pair) -> list[FinishedRun]:
    """Return the pair's students if its teacher was not trained in this setting.

    Students whose teacher another method trained are left out: that is another teacher.
    """
    if _plain_runs(group.scratch_runs, pair[0]):
        return []
    students = [run for run in group.distilled if (run.teacher, run.student) == pair]
    return [run for run in students if TEACHER_METHOD not in dict(run.variant)]


def _plain_runs(runs: Iterable[FinishedRun], network: str) -> list[FinishedRun]:
    return [run for run in runs if (run.student, run.method, run.variant) == (network, ALONE, ())]


@dataclass(frozen=True)
class Gain:
    """Points of top-1 over a reference, and their standard deviation if both have one."""

    points: float
    std: float | None


def gain(entry: Entry, reference: Entry) -> Gain:
    """Return the gain of ``entry`` over ``reference``; their seeds count as independent."""
    points = entry.mean - reference.mean
    if entry.std is None or reference.std is None:
        return Gain(points, None)
    return Gain(points, math.hypot(entry.std, reference.std))


def pair_gains(group: Group, table: str, pair: Pair) -> dict[RowKey, dict[RowKey, Gain]]:
    """Return the gains of each of the pair's methods, by row and then by reference."""
    entries = group.pair_entries(table, pair)
    references = {key: entries[key] for key in REFERENCES if key in entries}
    return {
        row: gains
        for row, entry in entries.items()
        if row not in (TEACHER, STUDENT)
        if (gains := {key: gain(entry, other) for key, other in references.items() if key != row})
    }


@dataclass(frozen=True)
class MissingCell:
    """An empty cell that has a published value. ``setting`` is text."""

    dataset: str
    setting: str
    table: str
    teacher: str
    student: str
    row: str


def find_missing(groups: Iterable[Group], unfinished: Iterable[Path]) -> list[MissingCell]:
    """Return the missing cells of the published pairs that have at least one student.

    The sources' own rows count, not those of later methods, which a table shows only with runs.
    A cell is not missing if an absolute folder in ``unfinished`` belongs to its row. The setting
    of that run does not matter, because a folder's name has only a hash of it.
    """
    in_progress = {_networks_in_path(folder) for folder in unfinished}
    return [
        cell
        for group in groups
        for cell in _empty_cells(group)
        if (cell.dataset, *_networks(cell)) not in in_progress
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
                    yield MissingCell(group.dataset, group.setting_title, table, *pair, row=row)


def _networks(cell: MissingCell) -> tuple[str, ...]:
    alone = {TEACHER_ROW: cell.teacher, STUDENT_ROW: cell.student}
    if cell.row in alone:
        return (alone[cell.row],)
    return f"{cell.teacher}-{cell.student}", cell.row


def _networks_in_path(folder: Path) -> tuple[str, ...]:
    """Return the dataset, the networks and the method in the path of a run's folder."""
    match folder.parts:
        case (*_, dataset, "distill", pair, method, _):
            return dataset, pair, display_name(method)
        case (*_, dataset, "scratch", network, _):
            return dataset, network
    return ()
