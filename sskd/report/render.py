"""Write tables as plain text, as GitHub markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from sskd.report.groups import Entry
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
