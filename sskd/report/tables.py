"""Lay the figures of many runs out as the published tables are."""

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
from sskd.report.published import SAME_TEACHER, Pair, RowKey, is_comparable, row_label
from sskd.report.results import Epoch, Result

COST_TITLE = "cost and agreement, means over seeds"
EPOCH_TITLES: dict[Epoch, str] = {"last": "last epoch", "best": "best epoch on the test set"}
LEGEND = "Top-1 in %: mean ± sample standard deviation over seeds (number of runs)."
PUBLISHED_LEGEND = (
    "Beside or beneath it, the published figure and ours - published; only if nothing but the"
    " precision differs from the published setting and configuration, and, if the teacher is a"
    f" file, its accuracy is the published teacher's (within {SAME_TEACHER} points)."
)
INCOMPARABLE_LEGEND = (
    "Without published figures: they were made with another schedule, batch size, optimizer or"
    " data than this setting's, so a difference would mean nothing."
)
TEACHER_LEGEND = (
    "A teacher that was not trained in this setting shows the accuracy that its students' runs"
    " measured, and its number counts distinct teachers."
)
COST_LEGEND = (
    "Cost and agreement: top-1 in % at the last epoch and at the best epoch on the test set; how"
    " often student and teacher agree; the KL divergence between them; a run's speed, peak memory"
    " (of the GPU, or of the process on a CPU, with the teacher's outputs that it read from a file)"
    " and time of training, a first phase that several students share included, computing the"
    " teacher's outputs beforehand not."
)


@dataclass(frozen=True)
class Table:
    """A table ready to print: cells are text, their lines separated by a newline.

    The first ``labels`` columns name the row; ``align`` (``"<"`` or ``">"``) is for the others.
    ``entries`` are the same figures as numbers; ``placed`` has, in a table of pairs, the entry
    of each cell that is no label. ``epoch`` is None where a table shows both.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int
    align: str
    entries: tuple[Entry, ...] = ()
    placed: tuple[tuple[Entry | None, ...], ...] = ()
    epoch: Epoch | None = None
    notes: tuple[str, ...] = ()


def build_tables(results: Iterable[Result], epoch: Epoch) -> list[Table]:
    """Return all tables: by dataset, then by setting, the unchanged recipe first."""
    tables: list[Table] = []
    for groups in build_groups(results, epoch):
        own = [table for group in groups for table in _group_tables(group)]
        # What is made from scratch is shared by the groups, and shown where no pair shows it.
        shown = {network for group in groups for pair in group.pairs() for network in pair}
        if runs := network_runs(groups[0], shown):
            own.append(_networks_table(groups[0], runs))
        last = max(index for index, table in enumerate(own) if table.entries)
        own[last] = replace(own[last], notes=_notes(groups))
        tables += own
    return _notes_once(tables)


def _notes_once(tables: list[Table]) -> list[Table]:
    """Leave each note beneath the last table that has it."""
    told: set[str] = set()
    kept = []
    for table in reversed(tables):
        kept.append(replace(table, notes=tuple(note for note in table.notes if note not in told)))
        told.update(table.notes)
    return kept[::-1]


def _notes(groups: list[Group]) -> tuple[str, ...]:
    sources = [group.published for group in groups if group.published and group.distilled]
    if not sources and groups[0].published:
        sources = [groups[0].published]
    notes = [LEGEND]
    if sources and is_comparable(groups[0].setting):
        notes += [PUBLISHED_LEGEND, *(note for source in sources for note in source.notes)]
    elif sources:
        notes.append(INCOMPARABLE_LEGEND)
    if any(group.distilled for group in groups):
        notes.append(TEACHER_LEGEND)
    if commits := _commits_in_one_mean(groups):
        told = ", ".join(commits)
        notes.append(f"Some means are over runs of different commits of the suite: {told}.")
    return tuple(notes)


def _commits_in_one_mean(groups: Iterable[Group]) -> list[str]:
    """Return the commits whose runs share a row, shortened."""
    shared: set[str] = set()
    for group in groups:
        rows = [network_runs(group, ())]
        rows += [group.pair_runs(pair) for pair in group.pairs()]
        for runs in (runs for of in rows for runs in of.values()):
            commits = {run.commit or "not recorded" for run in runs}
            shared |= commits if len(commits) > 1 else set()
    return sorted(re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", commit) for commit in shared)


def _group_tables(group: Group) -> Iterator[Table]:
    tables = group.pairs_by_table()
    for name, pairs in tables.items():
        yield _pairs_table(group, name, pairs)
    if tables:
        yield _cost_table(group, [pair for pairs in tables.values() for pair in pairs])


def _title(group: Group, table: str) -> str:
    return f"{group.dataset} · {group.setting_title} · {table} · {EPOCH_TITLES[group.epoch]}"


def _pairs_table(group: Group, name: str, pairs: list[Pair]) -> Table:
    columns = [group.pair_entries(name, pair) for pair in pairs]
    layout = {(row, ()) for row in group.layout(name)}
    rows, placed = [], []
    for key in sorted(layout.union(*columns), key=group.row_order):
        entries = [column.get(key) for column in columns]
        compared = any(entry and entry.published is not None for entry in entries)
        label = row_label(key) + ("\n  published" if compared else "")
        rows.append((label, *("\n".join(_lines(entry)) for entry in entries)))
        placed.append(tuple(entries))
        for rerun in _rerun_rows(group, key, pairs, entries):
            rows.append(rerun)
            placed.append((None,) * len(pairs))
    return Table(
        title=_title(group, name),
        header=("teacher\nstudent", *("\n".join(pair) for pair in pairs)),
        rows=tuple(rows),
        labels=1,
        align="<",
        entries=tuple(entry for column in columns for entry in column.values()),
        placed=tuple(placed),
        epoch=group.epoch,
    )


def _rerun_rows(
    group: Group, row: RowKey, pairs: Sequence[Pair], entries: Sequence[Entry | None]
) -> Iterator[tuple[str, ...]]:
    """Yield a row for each published re-run of ``row``, with figures where ours compares."""
    compared = [entry is not None and entry.published is not None for entry in entries]
    for rerun in group.published.reruns if group.published else ():
        found = [
            rerun.text(pair) if here else "" for pair, here in zip(pairs, compared, strict=True)
        ]
        if row == (rerun.row, ()) and any(found):
            # In the second line, which has what is published in other rows too.
            yield f"{rerun.label}\n  published re-run", *(text and f"\n{text}" for text in found)


def _networks_table(group: Group, runs: dict[RowKey, list[Result]]) -> Table:
    rows = []
    entries = network_entries(group, runs)
    for key, found in runs.items():
        sizes = " or ".join(f"{size:,}" for size in sorted({run.parameters for run in found}))
        top1, *published = _lines(entries[key])
        rows.append((row_label(key), top1, sizes, *(published or [""])))
    compared = any(entry.published is not None for entry in entries.values())
    shown = 4 if compared else 3
    return Table(
        title=_title(group, NETWORKS_TABLE),
        header=("network", "top-1", "parameters", "published")[:shown],
        rows=tuple(row[:shown] for row in rows),
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
            cells = (
                _mean((run.last for run in runs), "{:.2f}"),
                _mean((run.best for run in runs), "{:.2f}"),
                _mean((run.agreement for run in runs), "{:.2f}"),
                _mean((run.kl for run in runs), "{:.3f}"),
                _mean((run.images_per_second for run in runs), "{:,.0f}"),
                _mean((run.peak_memory_mib for run in runs), "{:,.0f}"),
                _mean((run.seconds / 3600 for run in runs), "{:.3f}"),
            )
            rows.append((label, row_label(key), *cells))
            label = ""
    return Table(
        title=f"{group.title} · {COST_TITLE}",
        header=("pair", "row", "last", "best", "agree %", "KL", "images/s", "MiB", "hours"),
        rows=tuple(rows),
        labels=2,
        align=">",
        notes=(COST_LEGEND,),
    )


def _lines(entry: Entry | None) -> list[str]:
    """Return our figure, and where there is a published one, that and the difference."""
    if entry is None:
        return []
    deviation = "" if entry.std is None else f" ± {entry.std:.2f}"
    ours = f"{entry.mean:.2f}{deviation} ({entry.n})"
    if entry.published is None or entry.difference is None:
        return [ours]
    # Adding 0.0 turns a difference that rounds to -0.00 into +0.00.
    return [ours, f"{entry.published:.2f} {round(entry.difference, 2) + 0.0:+.2f}"]


def _mean(values: Iterable[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    return style.format(statistics.mean(known)) if known else ""
