"""Write the report's files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from operator import methodcaller
from pathlib import Path

from sskd.errors import UserError
from sskd.files import write_atomically
from sskd.report.render import render_latex, render_markdown
from sskd.report.report import Report
from sskd.report.results import Epoch, Warn

SUFFIXES = (".md", ".csv", ".tex", ".html")


def write_files(report: Report, out: str, epoch: Epoch, warn: Warn) -> list[Path]:
    """Write the report's files, whose paths begin with ``out``, and return their paths.

    The files are the tables at ``epoch`` as markdown and LaTeX, the values of both epochs as CSV,
    everything as a page, and each figure as PNG and SVG. Malformed metrics are reported through
    ``warn``.

    Raises:
        UserError: ``out`` is a folder or cannot be written.
    """
    base = Path(out)
    if base.suffix in SUFFIXES:
        base = base.with_suffix("")
    if not base.name or base.is_dir():
        raise UserError(f"--out '{out}' is a folder; name a file in it, such as '{base / 'grid'}'")
    written = []
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for suffix, content in _contents(report, epoch, warn):
            path = base.with_name(f"{base.name}{suffix}")
            write_atomically(path, methodcaller("write", content))
            written.append(path)
    except OSError as error:
        raise UserError(f"--out '{out}': cannot write there ({error})") from error
    return written


def _contents(report: Report, epoch: Epoch, warn: Warn) -> Iterator[tuple[str, bytes]]:
    """Yield the suffix and the content of each file."""
    # Importing matplotlib takes longer than everything else here, and only these files need it.
    from sskd.report.figures import as_png, as_svg, draw_figures
    from sskd.report.page import render_page

    tables = report.tables(epoch)
    yield ".md", "\n".join(["# Results\n", *map(render_markdown, tables)]).encode()
    yield ".csv", report.csv().encode()
    yield ".tex", render_latex(tables).encode()
    figures = draw_figures(report, warn)
    svgs = {name: as_svg(figure) for name, figure in figures.items()}
    titles = {name: " ".join(figure.get_suptitle().split()) for name, figure in figures.items()}
    page = render_page(
        report, {name: (titles[name], svgs[name]) for name in figures}, datetime.now().astimezone()
    )
    yield ".html", page.encode()
    for name, figure in figures.items():
        yield f"-{name}.svg", svgs[name]
        yield f"-{name}.png", as_png(figure)
