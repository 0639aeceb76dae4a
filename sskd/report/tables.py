"""Lay the figures of many runs out as the published tables are."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sskd.report.groups import NETWORKS_TABLE, ROWS, Entry, Group, row_label, row_order
from sskd.report.published import Pair, published_for
from sskd.report.results import Epoch, Result

EPOCH_TITLES: dict[Epoch, str] = {"last": "last epoch", "best": "best epoch on the test set"}
LEGEND = "Top-1 in %: mean ± sample standard deviation over seeds (number of runs)."
PUBLISHED_LEGEND = "Beside or beneath it, the published figure and ours - published."
DISTILL_LEGENDS = (
    "A teacher that was not trained in this setting shows the accuracy that its students' runs"
    " measured, and its number counts distinct teachers.",
    "Cost and agreement: top-1 in % at the last epoch and at the best epoch on the test set; how"
    " often student and teacher agree; the KL divergence between them; a run's speed and time.",
)


@dataclass(frozen=True)
class Table:
    """A table ready to print: cells are text, their lines separated by a newline.

    The first ``labels`` columns name the row; ``align`` (``"<"`` or ``">"``) is for the others.
    ``entries`` are the same figures as numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int
    align: str
    entries: tuple[Entry, ...] = ()
    notes: tuple[str, ...] = ()


def build_tables(results: Iterable[Result], epoch: Epoch) -> list[Table]:
    """Return all tables: by dataset, then by setting, the unchanged recipe first."""
    results = list(results)
    tables: list[Table] = []
    for dataset in sorted({run.dataset for run in results}):
        published = published_for(dataset)
        here = [run for run in results if run.dataset == dataset]
        for setting in sorted({run.setting for run in here}):
            runs = tuple(run for run in here if run.setting == setting)
            tables += _group_tables(Group(dataset, setting, runs, epoch, published))
        notes = (f"{LEGEND} {PUBLISHED_LEGEND}", *published.notes) if published else (LEGEND,)
        if any(run.teacher for run in here):
            notes = (*notes, *DISTILL_LEGENDS)
        tables[-1] = replace(tables[-1], notes=notes)
    return tables


def _group_tables(group: Group) -> Iterator[Table]:
    tables = _pairs_by_table(group)
    for name, pairs in tables.items():
        yield _pairs_table(group, name, pairs)
    if tables:
        yield _cost_table(group, [pair for pairs in tables.values() for pair in pairs])
    if group.network_runs():
        yield _networks_table(group)


def _pairs_by_table(group: Group) -> dict[str, list[Pair]]:
    present = group.pairs()
    published = group.published.tables if group.published else {}
    tables = {
        name: [pair for pair in pairs if pair in present] for name, pairs in published.items()
    }
    elsewhere = present.difference(*tables.values())
    tables["other pairs" if published else "pairs"] = sorted(elsewhere)
    return {name: pairs for name, pairs in tables.items() if pairs}


def _title(group: Group, table: str) -> str:
    return f"{group.dataset} · {group.setting_title} · {table} · {EPOCH_TITLES[group.epoch]}"


def _pairs_table(group: Group, name: str, pairs: list[Pair]) -> Table:
    columns = [group.pair_entries(name, pair) for pair in pairs]
    # The published layout keeps its empty rows; elsewhere they would say nothing.
    as_published = group.published is not None and name in group.published.tables
    layout = {(row, ()) for row in ROWS} if as_published else set()
    rows = []
    for key in sorted(layout.union(*columns), key=row_order):
        entries = [column.get(key) for column in columns]
        compared = any(entry and entry.published is not None for entry in entries)
        label = row_label(key) + ("\n  published" if compared else "")
        rows.append((label, *("\n".join(_lines(entry)) for entry in entries)))
    return Table(
        title=_title(group, name),
        header=("teacher\nstudent", *("\n".join(pair) for pair in pairs)),
        rows=tuple(rows),
        labels=1,
        align="<",
        entries=tuple(entry for column in columns for entry in column.values()),
    )


def _networks_table(group: Group) -> Table:
    rows = []
    entries = group.network_entries()
    for key, runs in group.network_runs().items():
        sizes = " or ".join(f"{size:,}" for size in sorted({run.parameters for run in runs}))
        top1, *published = _lines(entries[key])
        rows.append((row_label(key), top1, sizes, *(published or [""])))
    shown = 4 if group.published else 3
    return Table(
        title=_title(group, NETWORKS_TABLE),
        header=("network", "top-1", "parameters", "published")[:shown],
        rows=tuple(row[:shown] for row in rows),
        labels=1,
        align=">",
        entries=tuple(entries.values()),
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
                _mean((run.seconds / 60 for run in runs), "{:.1f}"),
            )
            rows.append((label, row_label(key), *cells))
            label = ""
    return Table(
        title=f"{group.dataset} · {group.setting_title} · cost and agreement, means over seeds",
        header=("pair", "row", "last", "best", "agree %", "KL", "images/s", "minutes"),
        rows=tuple(rows),
        labels=2,
        align=">",
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
