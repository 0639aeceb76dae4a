"""Render the report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sskd.errors import mask_unprintable
from sskd.report.groups import GAIN_LEGEND, Entry
from sskd.report.plots import INK, PAPER
from sskd.report.published import STUDENT_ROW, TEACHER_ROW
from sskd.report.render import count_states, describe_progress
from sskd.report.report import Report
from sskd.report.tables import EPOCH_TITLES, Table

FULL_DIFFERENCE = 2.0  # points of top-1 from which the colour is full
BY_DIFFERENCE = f"Colours: measured - published; strongest from {FULL_DIFFERENCE:g} points on."


@dataclass(frozen=True)
class CellView:
    """A cell as the page shows it: its lines, the value to sort by, and a shade from -1 to 1."""

    lines: list[str]
    value: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class TableView:
    """A table as the page shows it, with the legend of its colours."""

    table: Table
    rows: list[list[CellView]]
    legend: str = ""


def render_page(report: Report, figures: Mapping[str, tuple[str, bytes]], made: datetime) -> str:
    """Return the page, dated ``made``.

    ``figures`` has the title and the SVG file of each of ``figures.draw_figures`` by name.
    """
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["moment"] = _moment
    tables = list(_both_epochs(report))
    return environment.get_template("page.html").render(
        runs=mask_unprintable(str(report.runs)),
        made=made,
        results=len(report.results),
        states=count_states(report.jobs),
        commits=Counter(result.commit or "not recorded" for result in report.results),
        epochs=EPOCH_TITLES,
        tables=[_view(table) for table in tables if table.epoch],
        costs=[_view(table) for table in tables if not table.epoch],
        figures=list(_figure_sections(figures)),
        unfinished=report.unfinished(),
        progress=describe_progress,
        missing=_missing(report),
    )


def _both_epochs(report: Report) -> Iterator[Table]:
    """Yield each table at the last epoch and, if it depends on the epoch, at the best."""
    for last, best in zip(report.tables("last"), report.tables("best"), strict=True):
        yield last
        if best.epoch:
            yield best


def _view(table: Table) -> TableView:
    shades, legend = _shades([cell.entry for row in table.rows for cell in row if cell.entry])
    rows, above = [], ""
    for index, row in enumerate(table.rows):
        # The table shows a repeated label once; sorting moves the rows, so here each row has it.
        above = row[0].text or above
        labels = [above, *(cell.text for cell in row[1 : table.labels])]
        # Sorting by a label restores the original order.
        views = [CellView(text.split("\n"), index) for text in labels]
        for cell in row[table.labels :]:
            shade = shades.get(cell.entry) if cell.entry else None
            views.append(CellView(cell.text.split("\n"), cell.value, shade))
        rows.append(views)
    return TableView(table, rows, legend)


def _shades(entries: Sequence[Entry]) -> tuple[dict[Entry, float], str]:
    """Return the shade of each entry, from -1 to 1, and the legend.

    The shade is the difference from the published value or, if no entry has one, the gain over
    the student alone.
    """
    points = {entry: entry.difference for entry in entries if entry.difference is not None}
    full, legend = FULL_DIFFERENCE, BY_DIFFERENCE
    if not points:
        points = dict(_gains_over_student(entries))
        full = max(map(abs, points.values()), default=0.0) or 1.0
        legend = (
            "Colours: gain over the student alone, because no published value compares; full from"
            f" {full:.2f} points."
        )
    shades = {entry: max(-1.0, min(1.0, value / full)) for entry, value in points.items()}
    return shades, legend if shades else ""


def _gains_over_student(entries: Iterable[Entry]) -> Iterator[tuple[Entry, float]]:
    entries = list(entries)
    # The columns of a study have several settings, and those of a pair can be of two accuracies.
    alone = {
        (e.setting, e.metric, e.teacher, e.student): e.mean for e in entries if e.row == STUDENT_ROW
    }
    for entry in entries:
        pair = (entry.setting, entry.metric, entry.teacher, entry.student)
        if pair in alone and entry.row not in (TEACHER_ROW, STUDENT_ROW):
            yield entry, entry.mean - alone[pair]


SECTIONS = {
    "gain": ("Gains", GAIN_LEGEND),
    "study": (
        "Studies",
        "Top-1 on the test set at the last epoch against the value of one setting: mean over seeds,"
        " with a bar of plus and minus one sample standard deviation. Hollow markers are published"
        " values. A star is the line's best value by the accuracy on held-out images.",
    ),
    "curves": (
        "Accuracy",
        "Top-1 on the test set after each epoch: mean over seeds, in a band of plus and minus one"
        " sample standard deviation. Only finished runs.",
    ),
    "losses": (
        "Loss terms",
        "Means over seeds by epoch, counted through all phases: as computed, and as weighted in"
        " the sum that was minimised.",
    ),
}


def _figure_sections(figures: Mapping[str, tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
    for kind, (heading, legend) in SECTIONS.items():
        found = [value for name, value in figures.items() if name.partition("-")[0] == kind]
        shown = [(title, _inline(svg)) for title, svg in found]
        yield {"kind": kind, "heading": heading, "legend": legend, "figures": shown}


def _inline(svg: bytes) -> Markup:
    """Return an SVG file as a part of the page, in the page's colours of ink and paper.

    Matplotlib, which made the file, has escaped all text in it.
    """
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    # Every figure has the same ids of groups. Nothing refers to them.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # Tenths of a point are finer than a screen's pixels, and halve the size.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), text)
    return Markup(text)


def _missing(report: Report) -> dict[tuple[str, str], list[str]]:
    """Return the missing rows of each (table, pair)."""
    rows: dict[tuple[str, str], list[str]] = {}
    for cell in report.missing():
        table = f"{cell.dataset} · {cell.setting} · {cell.table}"
        rows.setdefault((table, f"{cell.teacher}-{cell.student}"), []).append(cell.row)
    return rows


def _moment(moment: datetime | None) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if moment else ""
