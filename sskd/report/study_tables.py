"""Lay out studies as tables: a row for each method, a column for each value of the setting."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from sskd.report.groups import Entry, mean_std_n
from sskd.report.published import RowKey, row_label, settings_text
from sskd.report.published_studies import PublishedLine, Value, value_text
from sskd.report.results import ROW_KEYS, Epoch, Settings
from sskd.report.studies import Study
from sskd.report.tables import (
    COST_HEADER,
    COST_LEGEND,
    COST_TITLE,
    EPOCH_TITLES,
    LEGEND,
    Cell,
    Table,
    commits_notes,
    cost_cells,
    departures_notes,
    measured_text,
)

RECIPE_MARK, BEST_MARK = "recipe", "*"
STUDY_LEGEND = (
    "Studies: the runs of a row differ only in one setting and the seed. The recipe's own value of"
    " the setting is marked. The runs are in another table only if they have the recipe's value or"
    " that table compares more methods."
)
HOLDOUT_LEGEND = (
    "held-out: mean top-1 in % on the held-out training images (dataset.holdout). An asterisk marks"
    " the value of the setting with the best held-out top-1 of the row. The first line of a row is"
    " the top-1 on the test set."
)
PUBLISHED_LEGEND = (
    "Beneath a value of a study, the published one and the difference, measured - published; only"
    " if apart from the studied setting nothing but the precision differs from the recipe, and a"
    " teacher from a file has the published teacher's accuracy. Published values are of the best"
    " epoch on the test set (--best)."
)


def build_study_tables(studies: Sequence[Study], epoch: Epoch) -> list[Table]:
    """Return the table of each study, then the tables of their cost."""
    tables = [_study_table(study, epoch) for study in studies]
    shown: set[Path] = set()
    for study in studies:
        cells = {run.folder for run in study.runs()}
        if not cells <= shown:  # the studies of a grid's two settings have the same runs
            tables.append(_cost_table(study))
        shown |= cells
    return tables


def study_title(study: Study) -> str:
    """Return the dataset, the pair, the setting of all runs and the studied one."""
    return f"{study.dataset} · {study.setting_title} · {study.pair_name} · study of {study.key}"


def study_entry(study: Study, row: RowKey, value: Value, epoch: Epoch) -> Entry | None:
    """Return the entry of the cell of ``row`` and ``value``; None if it has no run."""
    runs = study.lines[row].get(value)
    if not runs:
        return None
    setting, name = _place(study, row, value)
    teacher, student = study.pair or ("", row[0])
    published = next(iter(study.published.get(row, ())), None)
    top1 = published.top1.get(value) if published else None
    return Entry(
        *(study.dataset, setting, f"study of {study.key}", teacher, student, name, epoch),
        *mean_std_n([run.top1(epoch) for run in runs]),
        None if top1 is None else float(top1),
    )


def holdout_means(study: Study, row: RowKey, epoch: Epoch) -> dict[Value, float]:
    """Return the mean top-1 on held-out images, in percent, of the values that have it."""
    found = {
        value: [top1 for run in runs if (top1 := run.holdout_top1(epoch)) is not None]
        for value, runs in study.lines[row].items()
    }
    return {value: statistics.fmean(top1) for value, top1 in found.items() if top1}


def best_by_holdout(study: Study, row: RowKey, epoch: Epoch) -> Value | None:
    """Return the value with the best mean on held-out images; None if several share it."""
    means = holdout_means(study, row, epoch)
    best = [value for value, mean in means.items() if mean == max(means.values())]
    return best[0] if len(best) == 1 and len(means) > 1 else None


def _place(study: Study, row: RowKey, value: Value) -> tuple[str, str]:
    """Return the setting and the row of a cell as other tables name them."""
    changed: Settings = ((study.key, value_text(value)),)
    name, variant = row
    if study.key.startswith(ROW_KEYS):
        setting = study.setting
        variant = tuple(sorted((*variant, *changed)))
    else:
        setting = tuple(sorted((*study.setting, *changed)))
    return settings_text(setting) or "the recipe", row_label((name, variant))


def _study_table(study: Study, epoch: Epoch) -> Table:
    rows: list[tuple[Cell, ...]] = []
    entries: list[Entry] = []
    for row in study.lines:
        found = [study_entry(study, row, value, epoch) for value in study.values]
        entries += [entry for entry in found if entry]
        rows += _rows(study, row, found, epoch)
    recipe = study.recipe_value
    marks = [f"\n{RECIPE_MARK}" if value == recipe else "" for value in study.values]
    header = [value_text(value) + mark for value, mark in zip(study.values, marks, strict=True)]
    return Table(
        title=f"{study_title(study)} · {EPOCH_TITLES[epoch]}",
        header=(study.key, *header),
        rows=tuple(rows),
        labels=1,
        align="<",
        entries=tuple(entries),
        epoch=epoch,
        notes=tuple(_notes(study, epoch)),
    )


def _rows(
    study: Study, row: RowKey, entries: Sequence[Entry | None], epoch: Epoch
) -> Iterator[tuple[Cell, ...]]:
    """Yield the row of a method and one for each further published source."""
    first, *others = study.published.get(row, ()) or (None,)
    held_out = holdout_means(study, row, epoch)
    best = best_by_holdout(study, row, epoch)
    label = row_label(row)
    if first:
        label += f"\n  published ({first.by})"
    elif held_out:
        label += "\n  held-out"
    cells = [Cell(label)]
    for value, entry in zip(study.values, entries, strict=True):
        measured = measured_text(entry) if entry else ""
        if value == best:
            measured += f" {BEST_MARK}"
        below = _published_text(first, value, entry) if first else ""
        if not first and value in held_out:
            below = f"{held_out[value]:.2f}"
        text = f"{measured}\n{below}" if below else measured
        cells.append(Cell(text, entry.mean if entry else None, entry))
    yield tuple(cells)
    for line in others:
        if line is not None:
            texts = [_published_text(line, value, None) for value in study.values]
            label = f"{row_label(row)}, {line.by}\n  published"
            yield (Cell(label), *(Cell(f"\n{text}" if text else "") for text in texts))


def _published_text(line: PublishedLine, value: Value, entry: Entry | None) -> str:
    """Return the published number, as published, and the difference if there is an entry."""
    text = line.top1.get(value, "")
    if not text or entry is None:
        return text
    digits = len(text.partition(".")[2])
    # Adding 0.0 turns a difference that rounds to -0.00 into +0.00.
    return f"{text} {round(entry.mean - float(text), digits) + 0.0:+.{digits}f}"


def _notes(study: Study, epoch: Epoch) -> Iterator[str]:
    yield LEGEND
    yield STUDY_LEGEND
    if any(holdout_means(study, row, epoch) for row in study.lines):
        yield HOLDOUT_LEGEND
    lines = [line for found in study.published.values() for line in found]
    if lines:
        yield PUBLISHED_LEGEND
    yield from dict.fromkeys(line.note for line in lines)
    yield from commits_notes(runs for cells in study.lines.values() for runs in cells.values())


def _cost_table(study: Study) -> Table:
    rows = []
    for row, cells in study.lines.items():
        label = row_label(row)
        for value, runs in cells.items():
            rows.append((Cell(label), Cell(value_text(value)), *cost_cells(runs)))
            label = ""
    by_row = ((row, runs) for row, cells in study.lines.items() for runs in cells.values())
    return Table(
        title=f"{study_title(study)} · {COST_TITLE}",
        header=("row", study.key, *COST_HEADER[2:]),
        rows=tuple(rows),
        labels=2,
        align=">",
        notes=(COST_LEGEND, *departures_notes(by_row)),
    )
