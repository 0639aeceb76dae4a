"""The table of SSKD's terms: KD, then with tf, then with ss, beside figure 3b of its paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sskd.report.groups import Entry, mean_std_n
from sskd.report.published import Pair, settings_text
from sskd.report.published_studies import TERMS_NOTE, published_terms, source_of
from sskd.report.results import (
    DIGEST,
    SHORT_DIGEST,
    Epoch,
    FinishedRun,
    Settings,
    as_number,
    numeric_order,
    without_digest,
)
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
    measured_text,
    published_text,
)

TF, SS = "method.weights.tf", "method.weights.ss"
KD_ROW, ALONE_ROW, TF_ROW, SS_ROW = "KD", "KD on SSKD's batches", "+ tf", "+ ss"
# The rows by the method and those weights of its terms that are 0.
ROWS = {
    ("kd", frozenset[str]()): KD_ROW,
    ("sskd", frozenset({TF, SS})): ALONE_ROW,
    ("sskd", frozenset({SS})): TF_ROW,
    ("sskd", frozenset[str]()): SS_ROW,
}
TITLE = "terms of SSKD"
LEGEND_OF_TERMS = (
    "Terms of SSKD: KD (method=kd), then SSKD without ss, then SSKD; KD on SSKD's batches is SSKD"
    " without tf and ss, whose batch normalisation sees the transformed views too."
)
# A pair, and the digest of its teacher's weights if it was recorded.
Column = tuple[Pair, str]


@dataclass(frozen=True)
class Terms:
    """The runs of SSKD's terms of one dataset and setting, by row and column."""

    dataset: str
    setting: Settings
    runs: dict[tuple[str, Column], tuple[FinishedRun, ...]]

    @property
    def title(self) -> str:
        """The dataset, the setting, and what the table is about."""
        return " · ".join((self.dataset, settings_text(self.setting) or "the recipe", TITLE))

    @property
    def columns(self) -> list[Column]:
        """The pairs that have a run with a part of the terms."""
        return sorted({column for row, column in self.runs if row in (ALONE_ROW, TF_ROW)})


def find_terms(results: Iterable[FinishedRun]) -> list[Terms]:
    """Return the runs of SSKD's terms of each dataset and setting that has some without ss."""
    found: dict[tuple[str, Settings], dict[tuple[str, Column], list[FinishedRun]]] = {}
    for run in results:
        row = _row(run)
        if row is not None and run.teacher is not None:
            column = ((run.teacher, run.student), run.origin.teacher or "")
            rows = found.setdefault((run.dataset, run.setting), {})
            rows.setdefault((row, column), []).append(run)
    places = sorted(found, key=lambda place: (place[0], numeric_order(place[1])))
    terms = [
        Terms(*place, runs={cell: tuple(runs) for cell, runs in found[place].items()})
        for place in places
    ]
    return [each for each in terms if each.columns]


def moved_term_runs(terms: Iterable[Terms]) -> set[Path]:
    """Return the folders of the runs without ss, which no other table shows."""
    return {
        run.folder
        for each in terms
        for (row, _), runs in each.runs.items()
        for run in runs
        if row in (ALONE_ROW, TF_ROW)
    }


def build_terms_tables(terms: Terms, epoch: Epoch) -> list[Table]:
    """Return the table of accuracies and the one of cost."""
    return [_terms_table(terms, epoch), _cost_table(terms)]


def _terms_table(terms: Terms, epoch: Epoch) -> Table:
    """Return the table: a column for each pair, and for each teacher if a pair has several."""
    columns = terms.columns
    rows, entries, compared = [], [], False
    for row in ROWS.values():
        found = [_entry(terms, row, column, epoch) for column in columns]
        if not any(found) and row == ALONE_ROW:
            continue
        entries += [entry for entry in found if entry]
        has_published = any(entry and entry.published is not None for entry in found)
        compared |= has_published
        cells = [_cell(entry) for entry in found]
        rows.append((Cell(row + "\n  published" * has_published), *cells))
    return Table(
        title=f"{terms.title} · {EPOCH_TITLES[epoch]}",
        header=("teacher\nstudent", *_names(columns)),
        rows=tuple(rows),
        labels=1,
        align="<",
        entries=tuple(entries),
        epoch=epoch,
        notes=(
            LEGEND,
            LEGEND_OF_TERMS,
            *([TERMS_NOTE] if compared else []),
            *commits_notes(terms.runs.values()),
        ),
    )


def _cost_table(terms: Terms) -> Table:
    rows = []
    for column, name in zip(terms.columns, _names(terms.columns), strict=True):
        label = name.replace("\n", "-")
        for row in ROWS.values():
            if runs := terms.runs.get((row, column)):
                rows.append((Cell(label), Cell(row), *cost_cells(runs)))
                label = ""
    return Table(
        title=f"{terms.title} · {COST_TITLE}",
        header=COST_HEADER,
        rows=tuple(rows),
        labels=2,
        align=">",
        notes=(COST_LEGEND,),
    )


def _row(run: FinishedRun) -> str | None:
    """Return the row of ``run``, whose other settings of method and teacher are the recipe's."""
    changes = without_digest(run.variant)
    if any(key not in (TF, SS) or as_number(text) != 0 for key, text in changes):
        return None
    return ROWS.get((run.method, frozenset(key for key, _ in changes)))


def _names(columns: Sequence[Column]) -> list[str]:
    several = len({pair for pair, _ in columns}) < len(columns)
    return [
        "\n".join((*pair, *([digest[:SHORT_DIGEST] or "unknown teacher"] if several else [])))
        for pair, digest in columns
    ]


def _cell(entry: Entry | None) -> Cell:
    if entry is None:
        return Cell()
    text = "\n".join(filter(None, (measured_text(entry), published_text(entry))))
    return Cell(text, entry.mean, entry)


def _entry(terms: Terms, row: str, column: Column, epoch: Epoch) -> Entry | None:
    runs = terms.runs.get((row, column))
    if not runs:
        return None
    pair, digest = column
    source = source_of(terms.dataset)
    same = source is not None and source.is_comparable(terms.setting)
    top1 = published_terms().get((pair, row)) if same else None
    # The figure's KD had the teachers of the tables' KD, unlike its other rows.
    teachers_of = "KD" if row == KD_ROW else "SSKD"
    if source is None or not all(source.has_teacher_of(teachers_of, run) for run in runs):
        top1 = None
    several = len({each for each in terms.columns if each[0] == pair}) > 1
    label = f"{row} ({DIGEST}={digest[:SHORT_DIGEST] or 'unknown'})" if several else row
    return Entry(
        *(terms.dataset, settings_text(terms.setting) or "the recipe", TITLE, *pair, label, epoch),
        *mean_std_n([run.top1(epoch) for run in runs]),
        None if top1 is None else float(top1),
    )
