"""Render the report as one HTML page that needs nothing else: no other file, no network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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

FULL_DIFFERENCE = 2.0  # points of top-1 from which a difference has its full colour
BY_DIFFERENCE = f"Colours: ours - published, full from {FULL_DIFFERENCE:g} points."


@dataclass(frozen=True)
class CellView:
    """A cell of a page's table: its lines, what it sorts by, and its colour from -1 to 1."""

    lines: list[str]
    value: float | None = None
    shade: float | None = None


@dataclass(frozen=True)
class TableView:
    """A table as the page shows it."""

    table: Table
    rows: list[list[CellView]]
    legend: str = ""


def render_page(report: Report, figures: Mapping[str, tuple[str, bytes]], made: datetime) -> str:
    """Return the page, made at the moment ``made``.

    ``figures`` are the titles and SVG files of ``figures.draw_figures`` by name.
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
    """Yield each table at the last epoch and, where it depends on that, at the best."""
    for last, best in zip(report.tables("last"), report.tables("best"), strict=True):
        yield last
        if best.epoch:
            yield best


def _view(table: Table) -> TableView:
    gains = {id(entry): gain for entry, gain in _gains_over_student(table.entries)}
    compared = any(entry.published is not None for entry in table.entries)
    full = FULL_DIFFERENCE if compared else max(map(abs, gains.values()), default=0.0) or 1.0

    def shade(entry: Entry) -> float | None:
        points = entry.difference if compared else gains.get(id(entry))
        return None if points is None else max(-1.0, min(1.0, points / full))

    def cell(text: str, entry: Entry | None) -> CellView:
        lines = text.split("\n")
        return (
            CellView(lines, entry.mean, shade(entry)) if entry else CellView(lines, _number(text))
        )

    rows, above = [], ""
    for index, row in enumerate(table.rows):
        placed = table.placed[index] if table.placed else (None,) * len(row)
        above = row[0] or above  # a label that is not repeated must be, where rows move
        # The labels sort into the order in which the rows were laid out.
        labels = [CellView(text.split("\n"), index) for text in (above, *row[1 : table.labels])]
        others = zip(row[table.labels :], placed, strict=False)
        rows.append([*labels, *(cell(text, entry) for text, entry in others)])
    legend = BY_DIFFERENCE if compared and table.placed else ""
    if gains and not compared:
        legend = (
            "Colours: gain over the student alone, as nothing published compares; full from"
            f" {full:.2f} points."
        )
    return TableView(table, rows, legend)


def _gains_over_student(entries: Iterable[Entry]) -> Iterator[tuple[Entry, float]]:
    entries = list(entries)
    alone = {(e.teacher, e.student): e.mean for e in entries if e.row == STUDENT_ROW}
    for entry in entries:
        pair = (entry.teacher, entry.student)
        if pair in alone and entry.row not in (TEACHER_ROW, STUDENT_ROW):
            yield entry, entry.mean - alone[pair]


def _number(text: str) -> float | None:
    found = re.match(r"[-+]?[\d,]+(\.\d+)?(e[-+]?\d+)?", text.strip())
    return float(found[0].replace(",", "") or 0) if found and re.search(r"\d", found[0]) else None


SECTIONS = {
    "gain": ("Gains", GAIN_LEGEND),
    "curves": (
        "Accuracy",
        "Top-1 on the test set after each epoch: mean over seeds, the band one sample standard"
        " deviation either way. Only finished runs.",
    ),
    "losses": (
        "Loss terms",
        "Means over seeds, by epoch through all stages: as computed, and as weighted in the sum"
        " that was minimised.",
    ),
}


def _figure_sections(figures: Mapping[str, tuple[str, bytes]]) -> Iterator[dict[str, Any]]:
    for kind, (heading, legend) in SECTIONS.items():
        of = [value for name, value in figures.items() if name.partition("-")[0] == kind]
        shown = [(title, _inline(svg)) for title, svg in of]
        yield {"kind": kind, "heading": heading, "legend": legend, "figures": shown}


def _inline(svg: bytes) -> Markup:
    """Return an SVG file as a part of a page, in the page's own ink and paper.

    It is matplotlib's, which has escaped every text in it.
    """
    text = svg.decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "none")
    # Names of groups, which nothing refers to, are the same in every figure.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # A tenth of a point is finer than a screen, and half the size.
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
