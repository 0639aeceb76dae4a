"""The look of the report's figures: colours, labels, margins."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.figure import Figure

from sskd.report.rows import RowKey, row_label

# Ink and paper are no colours of a line, so that a page can put its own in their place.
INK, PAPER = "#1b1f24", "#fefefe"
# Distinct from each other, also for colour-blind eyes, on light paper and on dark.
HUES = (
    *("#0072b2", "#d55e00", "#009e73", "#c2569b"),
    *("#a87900", "#3f9fd8", "#7f7f7f", "#8b63c9"),
)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
LONGEST_LABEL = 32  # "FitNet (weighting=crd_benchmark)"
# Inches: a line of the title, the room for the titles of the first panels, a sign of a label.
LINE, TITLE_ROOM, SIGN = 0.25, 0.55, 0.075
TITLE_SIGNS = 9.5  # an inch


def new_figure(title: str, width: float, height: float, legend: Sequence[Artist] = ()) -> Figure:
    """Return an empty figure of that size, in inches, and the room above for title and legend.

    The layout is set by hand, because one that measures every text takes seconds a figure.
    """
    lines = textwrap.wrap(title, int(width * TITLE_SIGNS))
    top = LINE * (len(lines) + bool(legend)) + 0.2
    figure = Figure(figsize=(width, height + top))
    x, y = 0.1 / width, 1 - 0.1 / (height + top)
    figure.suptitle("\n".join(lines), x=x, y=y, ha="left", va="top", fontsize=12)
    if legend:
        below = (0, y - LINE * len(lines) / (height + top))
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=below, ncols=len(legend))
    figure.subplots_adjust(top=1 - (top + TITLE_ROOM) / (height + top))
    return figure


def set_margins(figure: Figure, *, left: float, right: float, bottom: float) -> None:
    """Set the other margins, in inches."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=bottom / height)


def shorten(label: str) -> str:
    """Return ``label``, cut if it is longer than a figure has room for."""
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def longest_label(rows: Iterable[RowKey]) -> int:
    """Return the signs of the longest label, shortened, of ``rows``, of which there is one."""
    return max(len(shorten(row_label(row))) for row in rows)


def line_style(number: int) -> tuple[str, Any]:
    """Return the colour and the dashes of the line with that number; 24 lines differ."""
    return HUES[number % len(HUES)], DASHES[number // len(HUES) % len(DASHES)]
