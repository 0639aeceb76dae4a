"""Lay out the results of many runs as the published tables are."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sskd.report.groups import (
    NETWORKS_TABLE,
    Entry,
    Group,
    build_groups,
    network_entries,
    network_runs,
)
from sskd.report.published import (
    Pair,
    Published,
    RowKey,
    column_lines,
    metrics_of,
    row_label,
    settings_text,
)
from sskd.report.results import Epoch, FinishedRun, Metric

COST_TITLE = "cost and agreement, means over seeds"
EPOCH_TITLES: dict[Epoch, str] = {"last": "last epoch", "best": "best epoch on the test set"}
LEGEND = "Top-1 in %: mean ± sample standard deviation over seeds (number of runs)."
TOP5_LEGEND = (
    "Top-5 in %: the same for the share of test images whose class is among the five largest"
    " logits. Its best epoch is that of the best top-1."
)
PUBLISHED_LEGEND = (
    "Beside or beneath it, the published value and the difference, measured - published; only if"
    " {condition} (within {tolerance} points)."
)
INCOMPARABLE_LEGEND = (
    "Without published values: their schedule, batch size, optimizer or data differs from this"
    " setting's, so a difference would mean nothing."
)
TEACHER_LEGEND = (
    "For a teacher that was not trained in this setting, the table shows the accuracy that its"
    " students' runs measured, and the number of distinct teachers."
)
COST_LEGEND = (
    "Cost and agreement: top-1 in % at the last epoch, at the best epoch on the test set, and the"
    " gap between the two; the share of test images on which student and teacher agree; KL(teacher"
    " || student) in nats; the passes, the number of views of each image on which the student"
    " was trained; a run's images per second, its peak memory (of the GPU, or on a CPU of the"
    " process, including precomputed teacher outputs that it read from a file) and its training"
    " time, which includes a first phase that several students share, but not the precomputation of"
    " teacher outputs."
)
COST_HEADER = (
    *("pair", "row", "last", "best", "gap", "agree %", "KL"),
    *("passes", "images/s", "MiB", "hours"),
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: its lines, separated by a newline; each renderer escapes and aligns them.
        value: the number that the page sorts by; None for a label and an empty cell.
        entry: the entry of a cell of a pair, from which the page takes its colour.
    """

    text: str = ""
    value: float | None = None
    entry: Entry | None = None


@dataclass(frozen=True)
class Table:
    """A table, ready to render.

    Attributes:
        labels: the number of columns, from the first, that name the row.
        align: of the other columns: ``"<"`` or ``">"``.
        entries: the numbers of the table, for CSV and W&B.
        epoch: None if the table shows both.
        notes: shown beneath it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int
    align: str
    entries: tuple[Entry, ...] = ()
    epoch: Epoch | None = None
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The header and the rows as text."""
        return self.header, *(tuple(cell.text for cell in row) for row in self.rows)


def build_tables(results: Iterable[FinishedRun], epoch: Epoch) -> list[Table]:
    """Return all tables: by dataset, then by setting, the unchanged recipe first."""
    tables: list[Table] = []
    for groups in build_groups(results, epoch):
        found = [table for group in groups for table in _group_tables(group)]
        # All groups share the networks from scratch. Those of a pair are in the pair's table.
        shown = {network for group in groups for pair in group.pairs() for network in pair}
        if runs := network_runs(groups[0], shown):
            found.append(_networks_table(groups[0], runs))
        last = max(index for index, table in enumerate(found) if table.entries)
        compared = [e for each in found for e in each.entries if e.published is not None]
        found[last] = replace(found[last], notes=_notes(groups, compared))
        tables += found
    return notes_once(tables)


def notes_once(tables: Iterable[Table]) -> list[Table]:
    """Keep each note only beneath the last table that has it."""
    kept: set[str] = set()
    found = []
    for table in reversed(list(tables)):
        notes = tuple(note for note in table.notes if note not in kept)
        found.append(replace(table, notes=notes))
        kept.update(table.notes)
    return found[::-1]


def _notes(groups: list[Group], compared: Iterable[Entry]) -> tuple[str, ...]:
    """Return the notes of ``groups``; ``compared`` are their entries with published values."""
    sources = [group.published for group in groups if group.published and group.distilled]
    if not sources and groups[0].published:
        sources = [groups[0].published]
    notes = [LEGEND]
    if "top5" in metrics_of(groups[0].dataset) and any(group.distilled for group in groups):
        notes.append(TOP5_LEGEND)
    comparable = [source for source in sources if source.is_comparable(groups[0].setting)]
    if comparable:
        rows = {entry.row.partition(" (")[0] for entry in compared}
        notes += dict.fromkeys(map(_published_legend, comparable))
        notes += (n for source in comparable for n in (*source.notes, *source.later.notes(rows)))
    elif sources:
        notes.append(INCOMPARABLE_LEGEND)
    if any(group.distilled for group in groups):
        notes.append(TEACHER_LEGEND)
    return (*notes, *commits_notes(_cells(groups)))


def _published_legend(source: Published) -> str:
    return PUBLISHED_LEGEND.format(condition=source.condition, tolerance=source.teacher_tolerance)


def _cells(groups: Iterable[Group]) -> Iterator[Sequence[FinishedRun]]:
    """Yield the runs of each mean."""
    for group in groups:
        for rows in (network_runs(group, ()), *map(group.pair_runs, group.pairs())):
            yield from rows.values()


def commits_notes(cells: Iterable[Sequence[FinishedRun]]) -> Iterator[str]:
    """Yield a note with the shortened commits of the ``cells`` that have runs of several."""
    mixed: set[str] = set()
    for runs in cells:
        commits = {run.commit or "not recorded" for run in runs}
        mixed |= commits if len(commits) > 1 else set()
    if mixed:
        short = sorted(re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit) for commit in mixed)
        yield f"Some means are over runs of different commits of the suite: {', '.join(short)}."


def _group_tables(group: Group) -> Iterator[Table]:
    tables = group.pairs_by_table()
    for name, pairs in tables.items():
        yield _pairs_table(group, name, pairs)
    if tables:
        yield _cost_table(group, [pair for pairs in tables.values() for pair in pairs])


def _title(group: Group, table: str) -> str:
    return f"{group.dataset} · {group.setting_title} · {table} · {EPOCH_TITLES[group.epoch]}"


def _pairs_table(group: Group, name: str, pairs: list[Pair]) -> Table:
    metrics = metrics_of(group.dataset)
    places = [(pair, metric) for pair in pairs for metric in metrics]
    names = ("\n".join(column_lines(*place, metrics)) for place in places)
    columns = [group.pair_entries(name, pair, metric) for pair, metric in places]
    layout = {(row, ()) for row in group.layout(name)}
    rows = []
    for key in sorted(layout.union(*columns), key=group.row_order):
        entries = [column.get(key) for column in columns]
        compared = any(entry and entry.published is not None for entry in entries)
        label = row_label(key) + ("\n  published" if compared else "")
        rows.append((Cell(label), *map(_pair_cell, entries)))
        rows += _rerun_rows(group, key, places, entries)
    return Table(
        title=_title(group, name),
        header=("teacher\nstudent", *names),
        rows=tuple(rows),
        labels=1,
        align="<",
        entries=tuple(entry for column in columns for entry in column.values()),
        epoch=group.epoch,
    )


def _pair_cell(entry: Entry | None) -> Cell:
    if entry is None:
        return Cell()
    text = "\n".join(filter(None, (measured_text(entry), published_text(entry))))
    return Cell(text, entry.mean, entry)


def _rerun_rows(
    group: Group,
    row: RowKey,
    places: Sequence[tuple[Pair, Metric]],
    entries: Sequence[Entry | None],
) -> Iterator[tuple[Cell, ...]]:
    """Yield a row for each published re-run of ``row``, filled for the pairs that are compared.

    Only its top-1 was published.
    """
    compared = [entry is not None and entry.published is not None for entry in entries]
    for rerun in group.published.reruns if group.published else ():
        shown = [
            here and metric == "top1" and pair in rerun.top1
            for (pair, metric), here in zip(places, compared, strict=True)
        ]
        if row == (rerun.row, ()) and any(shown):
            # The second line is where other rows show published values.
            yield (
                Cell(f"{rerun.label}\n  published re-run"),
                *(
                    Cell(f"\n{rerun.text(pair)}", rerun.top1[pair][0]) if here else Cell()
                    for (pair, _), here in zip(places, shown, strict=True)
                ),
            )


def _networks_table(group: Group, runs: dict[RowKey, list[FinishedRun]]) -> Table:
    entries = network_entries(group, runs)
    compared = any(entry.published is not None for entry in entries.values())
    columns = 4 if compared else 3
    rows = []
    for key, entry in entries.items():
        sizes = sorted({run.parameters for run in runs[key]})
        cells = (
            Cell(row_label(key)),
            Cell(measured_text(entry), round(entry.mean, 2)),
            Cell(" or ".join(f"{size:,}" for size in sizes), float(sizes[0])),
            Cell(published_text(entry), entry.published),
        )
        rows.append(cells[:columns])
    return Table(
        title=_title(group, NETWORKS_TABLE),
        header=("network", "top-1", "parameters", "published")[:columns],
        rows=tuple(rows),
        labels=1,
        align=">",
        entries=tuple(entries.values()),
        epoch=group.epoch,
    )


def _cost_table(group: Group, pairs: list[Pair]) -> Table:
    rows = []
    for pair in pairs:
        label = "-".join(pair)
        for key, runs in group.pair_runs(pair).items():
            rows.append((Cell(label), Cell(row_label(key)), *cost_cells(runs)))
            label = ""
    return Table(
        title=f"{group.title} · {COST_TITLE}",
        header=COST_HEADER,
        rows=tuple(rows),
        labels=2,
        align=">",
        notes=(COST_LEGEND, *departures_notes(_rows_of(group, pairs))),
    )


def cost_cells(runs: Sequence[FinishedRun]) -> tuple[Cell, ...]:
    """Return the cells of a row of a table of cost, means over ``runs``."""
    return (
        _mean_cell((run.last for run in runs), digits=2),
        _mean_cell((run.best for run in runs), digits=2),
        _mean_cell((run.best - run.last for run in runs), digits=2),
        _mean_cell((run.agreement for run in runs), digits=2),
        _mean_cell((run.kl for run in runs), digits=3),
        _mean_cell((run.passes for run in runs), digits=0),
        _mean_cell((run.images_per_second for run in runs), digits=0),
        _mean_cell((run.peak_memory_mib for run in runs), digits=0),
        _mean_cell((run.seconds / 3600 for run in runs), digits=3),
    )


def _rows_of(group: Group, pairs: Iterable[Pair]) -> Iterator[tuple[RowKey, list[FinishedRun]]]:
    return (item for pair in pairs for item in group.pair_runs(pair).items())


def departures_notes(
    rows: Iterable[tuple[RowKey, Sequence[FinishedRun]]],
) -> Iterator[str]:
    """Yield one note with the settings that methods replace, if any does."""
    pairs_of: dict[str, dict[str, None]] = {}
    for key, runs in rows:
        for run in runs:
            if run.departures:
                text = f"{row_label(key)}: {settings_text(run.departures)}"
                pairs_of.setdefault(text, {})[f"{run.teacher}-{run.student}"] = None
    if pairs_of:
        changed = "; ".join(f"{text} ({', '.join(names)})" for text, names in pairs_of.items())
        yield f"Settings that a method replaces in the recipe. {changed}."


def measured_text(entry: Entry) -> str:
    """Return the mean, the deviation if there is one, and the number of runs."""
    deviation = "" if entry.std is None else f" ± {entry.std:.2f}"
    return f"{entry.mean:.2f}{deviation} ({entry.n})"


def published_text(entry: Entry) -> str:
    """Return the published value and the difference, or an empty text if there is none."""
    if entry.published is None or entry.difference is None:
        return ""
    # Adding 0.0 turns a difference that rounds to -0.00 into +0.00.
    return f"{entry.published:.2f} {round(entry.difference, 2) + 0.0:+.2f}"


def _mean_cell(values: Iterable[float | None], digits: int) -> Cell:
    """Return a cell of the mean of the known values, rounded so that rows that look equal tie."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell()
    mean = statistics.mean(known)
    return Cell(f"{mean:,.{digits}f}", round(mean, digits))
