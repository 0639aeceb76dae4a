"""Write tables as LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest

from sskd.report.tables import Table

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
        rf"\caption{{{_escaped(table.title)}}}",
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
    yield from (rf"\noindent {_escaped(note)}\par" for note in table.notes)


def _row_lines(row: Iterable[str]) -> Iterator[str]:
    cells = (cell.split("\n") for cell in row)
    for line in zip_longest(*cells, fillvalue=""):
        yield " & ".join(_number(text) for text in line) + r" \\"


def _number(text: str) -> str:
    """Escape a cell, with a true minus where it holds a difference below zero."""
    return _escaped(text).replace(" -", " $-$")


def _escaped(text: str) -> str:
    signs = (SIGNS.get(sign, sign if sign.isascii() else "?") for sign in text)
    return "".join(signs).replace("--", "-{}-")  # two hyphens would become a dash
