"""Write tables as plain text, as GitHub markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import zip_longest

from sskd.report.groups import Entry
from sskd.report.status import STATES, Job
from sskd.report.tables import Table

GAP = "  "
CSV_HEADER = (
    *("dataset", "setting", "table", "teacher", "student", "row", "epoch"),
    *("mean", "std", "n", "published", "difference"),
)


def render_text(table: Table, width: int) -> str:
    """Return ``table`` as aligned plain text, in blocks of columns no wider than ``width``.

    A block has at least one column, so a very narrow terminal still breaks its lines.
    """
    title = textwrap.wrap(table.title, width)
    lines = [*title, "=" * max(map(len, title))]
    for columns in _blocks(table, width):
        lines += [*_block_lines(table, columns), ""]
    for note in table.notes:
        lines += textwrap.wrap(note, width, subsequent_indent="  ")
    return "\n".join(lines).rstrip() + "\n"


def render_markdown(table: Table) -> str:
    """Return ``table`` as GitHub markdown; what a name holds cannot become markup."""
    others = len(table.header) - table.labels
    rule = [":---"] * table.labels + ["---:" if table.align == ">" else ":---"] * others
    rows = [[_escaped(cell) for cell in row] for row in (table.header, *table.rows)]
    lines = [f"## {_escaped(table.title)}", ""]
    lines += [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
    for note in table.notes:
        lines += ["", _escaped(note)]
    return "\n".join(lines) + "\n"


def render_csv(entries: Iterable[Entry]) -> str:
    """Return one line per figure, numbers with up to 4 decimals, None as an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for entry in entries:
        writer.writerow(_csv_cell(getattr(entry, name)) for name in CSV_HEADER)
    return text.getvalue()


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


def _block_lines(table: Table, columns: list[int]) -> Iterator[str]:
    widths = [_width(table, column) for column in columns]
    for row in (table.header, *table.rows):
        cells = [row[column].split("\n") for column in columns]
        for index, line in enumerate(zip_longest(*cells, fillvalue="")):
            # A second line that only has its label has its figures in another block.
            if index and not any(line[table.labels :]):
                continue
            padded = (
                f"{text:{'<' if column < table.labels else table.align}{size}}"
                for text, column, size in zip(line, columns, widths, strict=True)
            )
            yield GAP.join(padded).rstrip()
        if row is table.header:
            yield GAP.join("-" * size for size in widths)


def _width(table: Table, column: int) -> int:
    cells = (row[column] for row in (table.header, *table.rows))
    return max(len(line) for cell in cells for line in cell.split("\n"))


# Signs of markup in GitHub's dialect, which has formulas and struck-out text, and makes links of
# bare addresses. An underscore within a word is none.
_MARKUP = re.compile(
    r"[\\`*\[\]|<&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE
)

# The colon in front of an emoji's name, in which underscores may be escaped by now.
_EMOJI_OR_AT = re.compile(r":(?=[\w+\\-]+:)|@")


def _escaped(text: str) -> str:
    escaped = _MARKUP.sub(r"\\\g<0>", text)
    # Behind a backslash an address with an @, and an emoji's name, stay one; with a comment not.
    return _EMOJI_OR_AT.sub(r"\g<0><!-- -->", escaped).replace("\n", "<br>")


def _csv_cell(value: str | float | None) -> str | float:
    if value is None:
        return ""
    if isinstance(value, str):
        # Spreadsheets run a cell that begins so as a formula, with wide signs too; the apostrophe
        # makes it text. Where lists are separated by semicolons a cell begins behind one too.
        return re.sub(r"(^|[;\t])(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'", value)
    return round(value, 4)


HEAD = r"""% Tables of runs beside published figures; \input this file in a document.
% Needs \usepackage{booktabs} and \usepackage{graphicx} (tables wider than the line are scaled).
"""
SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "·": r"$\cdot$",
    # At the beginning of a row both would belong to the line break before it.
    "[": "{[}",
    "*": "{*}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def render_latex(tables: Iterable[Table]) -> str:
    """Return ``tables`` as a file for ``\\input``, each a float, followed by its notes.

    It compiles with any engine: a sign outside ASCII, which few fonts have, becomes ``?``.
    """
    return HEAD + "".join(f"\n{part}\n" for table in tables for part in _parts(table))


def _parts(table: Table) -> Iterator[str]:
    others = len(table.header) - table.labels
    columns = "l" * table.labels + ("l" if table.align == "<" else "r") * others
    lines = [
        r"\begin{table}[htbp]",
        rf"\caption{{{_latex_escaped(table.title)}}}",
        r"\centering\footnotesize",
        rf"\sbox0{{\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *_row_lines(table.header),
        r"\midrule",
        *(line for row in table.rows for line in _row_lines(row)),
        r"\bottomrule",
        r"\end{tabular}}%",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        r"\end{table}",
    ]
    yield "\n".join(lines)
    yield from (rf"\noindent {_latex_escaped(note)}\par" for note in table.notes)


def _row_lines(row: Iterable[str]) -> Iterator[str]:
    cells = (cell.split("\n") for cell in row)
    for line in zip_longest(*cells, fillvalue=""):
        yield " & ".join(_number(text) for text in line) + r" \\"


def _number(text: str) -> str:
    """Escape a cell, with a true minus where it holds a difference below zero."""
    return _latex_escaped(text).replace(" -", " $-$")


def _latex_escaped(text: str) -> str:
    signs = (SIGNS.get(sign, sign if sign.isascii() else "?") for sign in text)
    return "".join(signs).replace("--", "-{}-")  # two hyphens would become a dash


def render_status(jobs: Iterable[Job], width: int, now: datetime) -> str:
    """Return a line of counts, then each unfinished job by state; finished ones are only counted.

    Times of day are those of ``now``'s zone.
    """
    jobs = list(jobs)
    lines = [count_states(jobs) or "no runs yet"]
    for state in STATES[:-1]:
        here = [job for job in jobs if job.state == state]
        if here:
            lines += ["", state]
        for job in here:
            lines += _job_lines(job, width, now)
    return "\n".join(lines) + "\n"


def count_states(jobs: Iterable[Job]) -> str:
    """Return how many jobs are in each state that any is in."""
    counts = Counter(job.state for job in jobs)
    return " · ".join(f"{counts[state]} {state}" for state in STATES if counts[state])


def describe_progress(job: Job) -> str:
    """Return the epochs done, the rate and the time left, as far as they are known."""
    return " · ".join(_progress(job))


def _job_lines(job: Job, width: int, now: datetime) -> Iterator[str]:
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
        line, rest = "   ", rest
    yield f"{line}  {rest}".rstrip()
    if job.error:
        indent = "     "
        yield from textwrap.wrap(job.error, width, initial_indent=indent, subsequent_indent=indent)


def _progress(job: Job) -> Iterator[str]:
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
