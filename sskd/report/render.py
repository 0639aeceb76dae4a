"""Render tables as plain text, markdown, CSV and LaTeX, and jobs as plain text."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import zip_longest

from sskd.report.groups import Entry
from sskd.report.status import STATES, JobStatus
from sskd.report.tables import Cell, Table

GAP = "  "
CSV_HEADER = (
    *("dataset", "setting", "table", "teacher", "student", "row", "metric", "epoch"),
    *("mean", "std", "n", "published", "difference"),
)


def render_text(table: Table, width: int) -> str:
    """Return ``table`` as aligned plain text, in blocks of columns no wider than ``width``.

    A block has at least one column, so on a very narrow terminal the lines are still wrapped.
    """
    title = textwrap.wrap(table.title, width)
    lines = [*title, "=" * max(map(len, title))]
    for columns in _blocks(table, width):
        lines += [*_block_lines(table, columns), ""]
    for note in table.notes:
        lines += textwrap.wrap(note, width, subsequent_indent="  ")
    return "\n".join(lines).rstrip() + "\n"


def _blocks(table: Table, width: int) -> Iterator[list[int]]:
    """Yield the columns of each block; every block begins with the labels."""
    labels = list(range(table.labels))
    block = list(labels)
    for column in range(table.labels, len(table.header)):
        needed = sum(_width(table, shown) + len(GAP) for shown in [*block, column]) - len(GAP)
        if needed > width and block != labels:
            yield block
            block = list(labels)
        block.append(column)
    yield block


def _block_lines(table: Table, columns: Sequence[int]) -> Iterator[str]:
    widths = [_width(table, column) for column in columns]
    for number, row in enumerate(table.texts):
        cells = [row[column].split("\n") for column in columns]
        for index, line in enumerate(zip_longest(*cells, fillvalue="")):
            # If only the label has a second line, the values of that line are in another block.
            if index and not any(line[table.labels :]):
                continue
            padded = (
                f"{text:{'<' if column < table.labels else table.align}{size}}"
                for text, column, size in zip(line, columns, widths, strict=True)
            )
            yield GAP.join(padded).rstrip()
        if number == 0:
            yield GAP.join("-" * size for size in widths)


def _width(table: Table, column: int) -> int:
    return max(len(line) for row in table.texts for line in row[column].split("\n"))


def render_markdown(table: Table) -> str:
    """Return ``table`` as GitHub markdown; no name in it can become markup."""
    others = len(table.header) - table.labels
    rule = [":---"] * table.labels + ["---:" if table.align == ">" else ":---"] * others
    header, *rows = ([_escape_markdown(text) for text in row] for row in table.texts)
    lines = [f"## {_escape_markdown(table.title)}", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
    for note in table.notes:
        lines += ["", _escape_markdown(note)]
    return "\n".join(lines) + "\n"


# Characters of GitHub's markup, which has formulas and struck-out text and turns plain addresses
# into links. An underscore inside a word is no markup.
_MARKUP = re.compile(
    r"[\\`*\[\]|<&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE
)

# The colon before the name of an emoji, in which underscores may be escaped already.
_EMOJI_OR_AT = re.compile(r":(?=[\w+\\-]+:)|@")


def _escape_markdown(text: str) -> str:
    escaped = _MARKUP.sub(r"\\\g<0>", text)
    # A backslash does not stop an address with an @ or an emoji, but a comment does.
    return _EMOJI_OR_AT.sub(r"\g<0><!-- -->", escaped).replace("\n", "<br>")


def render_csv(entries: Iterable[Entry]) -> str:
    """Return one line per entry: numbers with up to 4 decimals, None as an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for entry in entries:
        writer.writerow(csv_field(getattr(entry, name)) for name in CSV_HEADER)
    return text.getvalue()


def csv_field(value: str | float | None) -> str | float:
    """Return a value as a field: a number with up to 4 decimals, None as an empty text."""
    if value is None:
        return ""
    if isinstance(value, str):
        # A spreadsheet runs a field that begins with one of these characters, also a full-width
        # one, as a formula; an apostrophe makes it text. If the spreadsheet separates lists by
        # semicolons, a field begins after one too.
        return re.sub(r"(^|[;\t])(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'", value)
    return round(value, 4)


LATEX_HEAD = r"""% Tables of runs beside published values; \input this file in a document.
% Needs \usepackage{booktabs} and \usepackage{graphicx} (tables wider than the line are scaled).
"""
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    # At the beginning of a row, both would be an argument of the line break before it.
    "[": "{[}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def render_latex(tables: Iterable[Table]) -> str:
    """Return ``tables`` as a file for ``\\input``, each a float, followed by its notes.

    The file compiles with any engine: a character outside ASCII, which few fonts have, becomes
    ``?``.
    """
    return LATEX_HEAD + "".join(f"\n{part}\n" for table in tables for part in _latex_parts(table))


def _latex_parts(table: Table) -> Iterator[str]:
    others = len(table.header) - table.labels
    columns = "l" * table.labels + ("l" if table.align == "<" else "r") * others
    header = [_escape_latex(text) for text in table.header]
    rows = ([_latex_cell(cell) for cell in row] for row in table.rows)
    lines = [
        r"\begin{table}[htbp]",
        rf"\caption{{{_escape_latex(table.title)}}}",
        r"\centering\footnotesize",
        rf"\sbox0{{\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *_latex_lines(header),
        r"\midrule",
        *(line for row in rows for line in _latex_lines(row)),
        r"\bottomrule",
        r"\end{tabular}}%",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        r"\end{table}",
    ]
    yield "\n".join(lines)
    yield from (rf"\noindent {_escape_latex(note)}\par" for note in table.notes)


def _latex_lines(row: Iterable[str]) -> Iterator[str]:
    cells = (text.split("\n") for text in row)
    for line in zip_longest(*cells, fillvalue=""):
        yield " & ".join(line) + r" \\"


def _latex_cell(cell: Cell) -> str:
    text = _escape_latex(cell.text)
    # A negative difference gets a minus, not a hyphen.
    return text if cell.value is None else text.replace(" -", " $-$")


def _escape_latex(text: str) -> str:
    escaped = (LATEX_ESCAPES.get(char, char if char.isascii() else "?") for char in text)
    return "".join(escaped).replace("--", "-{}-")  # two hyphens would become a dash


def render_status(jobs: Iterable[JobStatus], width: int, now: datetime) -> str:
    """Return a line of counts, then the unfinished jobs by state; finished jobs are only counted.

    Times are in the zone of ``now``.
    """
    jobs = list(jobs)
    lines = [count_states(jobs) or "no runs yet"]
    for state in STATES[:-1]:
        found = [job for job in jobs if job.state == state]
        if found:
            lines += ["", state]
        for job in found:
            lines += _job_lines(job, width, now)
    return "\n".join(lines) + "\n"


def count_states(jobs: Iterable[JobStatus]) -> str:
    """Return the number of jobs in each state that any job has."""
    counts = Counter(job.state for job in jobs)
    return " · ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def describe_progress(job: JobStatus) -> str:
    """Return the finished epochs, the rate and the time left, as far as they are known."""
    return " · ".join(_progress(job))


def _job_lines(job: JobStatus, width: int, now: datetime) -> Iterator[str]:
    details = list(_progress(job))
    if job.since:
        since = job.since.astimezone(now.tzinfo)
        today = since.date() == now.date()
        details.append(f"since {since:%H:%M}" if today else f"since {since:%Y-%m-%d %H:%M}")
    if job.host:
        details.append(f"on {job.host}")
    line, rest = f"  {job.name}", " · ".join(details)
    if rest and len(line) + len(rest) + 2 > width:
        yield line
        line = "   "
    yield f"{line}  {rest}".rstrip()
    if job.error:
        indent = "     "
        yield from textwrap.wrap(job.error, width, initial_indent=indent, subsequent_indent=indent)


def _progress(job: JobStatus) -> Iterator[str]:
    if job.total:
        yield f"{job.done}/{job.total} epochs, {job.done / job.total:.0%}"
    elif job.done:
        yield f"{job.done} {'epoch' if job.done == 1 else 'epochs'}"
    if job.rate is not None and job.state == "running":
        yield f"{job.rate:,.0f} images/s"
    if job.seconds_left is not None:
        yield f"{_duration(job.seconds_left)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"))
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
