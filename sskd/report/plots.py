"""Draw the report's figures: gains, accuracy curves, loss terms."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from sskd.report.groups import REFERENCES, Gain
from sskd.report.published import Pair, RowKey, row_label

# No line has these two colours, so a page can replace them by its colours.
INK, PAPER = "#1b1f24", "#fefefe"
# Distinct, also for colour-blind eyes, on light paper and on dark.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#c2569b"),
    *("#a87900", "#3f9fd8", "#7f7f7f", "#8b63c9"),
)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name with two dollar signs is not a formula
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
BAND = 0.18  # opacity
LONGEST_LABEL = 32  # characters: "FitNet (weighting=crd_benchmark)"
# In inches.
LINE_HEIGHT, PANEL_TITLE_HEIGHT, CHARACTER_WIDTH = 0.25, 0.55, 0.075
TITLE_CHARACTERS_PER_INCH = 9.5

Gains = Mapping[RowKey, Mapping[RowKey, Gain]]


@dataclass(frozen=True)
class Curve:
    """A metric by epoch: means and sample standard deviations over seeds (0 for a single run)."""

    epochs: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def low(self) -> tuple[float, ...]:
        """Return the mean minus the standard deviation at each epoch."""
        return tuple(mean - std for mean, std in zip(self.mean, self.std, strict=True))

    @property
    def high(self) -> tuple[float, ...]:
        """Return the mean plus the standard deviation at each epoch."""
        return tuple(mean + std for mean, std in zip(self.mean, self.std, strict=True))


def draw_gains(title: str, rows: Sequence[RowKey], gains: Mapping[Pair, Gains]) -> Figure:
    """Return a panel for each pair, with a bar for each of ``rows`` and each reference in it."""
    columns = min(4, len(gains))
    lines = math.ceil(len(gains) / columns)
    labels = [shorten(row_label(row)) for row in rows]
    left = 0.4 + CHARACTER_WIDTH * longest_label(rows)
    compared = {key for by_row in gains.values() for found in by_row.values() for key in found}
    colors = {key: color for key, color in zip(REFERENCES, COLORS, strict=False) if key in compared}
    legend = _gain_legend(colors, gains.values())
    panel = 0.3 * len(rows)
    figure = new_figure(title, max(2.6 * columns + left, 6), lines * (panel + 1.1), legend)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    set_margins(figure, left=left, right=0.15, bottom=0.55)
    figure.subplots_adjust(wspace=0.08, hspace=1.1 / panel)
    for axes, (pair, found) in zip(panels, gains.items(), strict=False):
        _draw_bars(axes, rows, found, colors)
        axes.set_title("\n→ ".join(map(shorten, pair)), loc="left")
        axes.set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for axes in panels[len(gains) :]:
        axes.set_visible(False)
    return figure


def _gain_legend(colors: Mapping[RowKey, str], gains: Iterable[Gains]) -> list[Artist]:
    """Return an entry for each reference, and one for the error bars if there are any."""
    bars = [Patch(color=color, label=REFERENCES[key]) for key, color in colors.items()]
    found = [gain for by_row in gains for by in by_row.values() for gain in by.values()]
    if all(gain.std is None for gain in found):
        return [*bars]
    return [*bars, Line2D([], [], color=INK, lw=1, label="± std of the difference")]


def _draw_bars(
    axes: Axes, rows: Sequence[RowKey], gains: Gains, colors: Mapping[RowKey, str]
) -> None:
    for number, (reference, color) in enumerate(colors.items()):
        bars = {row: by[reference] for row, by in gains.items() if reference in by}
        axes.barh(
            [rows.index(row) + 0.38 * (number - (len(colors) - 1) / 2) for row in bars],
            [bar.points for bar in bars.values()],
            xerr=[math.nan if bar.std is None else bar.std for bar in bars.values()],
            height=0.36,
            color=color,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("points of top-1")
    axes.tick_params(labelbottom=True)


def draw_curves(title: str, rows: Sequence[RowKey], curves: Mapping[RowKey, Curve]) -> Figure:
    """Return top-1 by epoch, over all epochs and over the last quarter, a line for each row.

    ``rows`` are all rows of the group, so that a row has the same line in the figure of each pair.
    The last quarters of runs with different numbers of epochs are drawn by the share of the epochs.
    """
    figure = new_figure(title, 13, 4.8, _band_legend(curves.values()))
    whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
    right = 1.6 + CHARACTER_WIDTH * longest_label(curves)
    set_margins(figure, left=0.6, right=right, bottom=0.55)
    figure.subplots_adjust(wspace=0.12)
    lengths = {curve.epochs[-1] for curve in curves.values()}
    last, unit = (max(lengths), "epoch") if len(lengths) == 1 else (100, "% of the run's epochs")
    shown: list[float] = []
    for row, curve in curves.items():
        places = [epoch * last / curve.epochs[-1] for epoch in curve.epochs]
        for axes, at in ((whole, curve.epochs), (end, places)):
            _draw_curve(axes, curve, *line_style(rows.index(row)), at=at)
        for edge in (curve.low, curve.high):
            shown += _values_from(0.75 * last, places, edge)
    margin = 0.05 * (max(shown) - min(shown)) + 0.1
    end.set_ylim(min(shown) - margin, max(shown) + margin)
    end.set_xlim(0.75 * last, last)
    whole.set_xlim(0, max(lengths))
    whole.set_title("all epochs", loc="left")
    end.set_title("the last quarter", loc="left")
    whole.set_ylabel("top-1 on the test set, %")
    for axes, label in ((whole, "epoch"), (end, unit)):
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    _label_ends(end, rows, curves)
    return figure


def draw_losses(
    title: str,
    losses: Mapping[RowKey, tuple[Mapping[str, Curve], Mapping[str, Curve]]],
    phase_ends: Mapping[RowKey, Sequence[int]],
) -> Figure:
    """Return a panel for each row: its loss terms by epoch, counted through all phases.

    ``losses`` has the terms as computed and as weighted; ``phase_ends`` has the epochs after which
    another phase begins.
    """
    columns = min(4, len(losses))
    lines = math.ceil(len(losses) / columns)
    styles = {"as computed": "-", "weighted": DASHES[1], "another phase begins": ":"}
    legend = [
        *(Line2D([], [], color=INK, ls=dash, label=text) for text, dash in styles.items()),
        *_band_legend(curve for both in losses.values() for by in both for curve in by.values()),
    ]
    figure = new_figure(title, max(3.2 * columns + 0.2, 7.2), 2.6 * lines, legend)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    set_margins(figure, left=0.6, right=0.15, bottom=0.5)
    figure.subplots_adjust(wspace=0.25, hspace=0.6)
    frequency = Counter(term for raw, _ in losses.values() for term in raw)
    for axes, (row, (raw, weighted)) in zip(panels, losses.items(), strict=False):
        # The terms that most methods share come first, so they have the same colour everywhere.
        terms = sorted({**raw, **weighted}, key=lambda term: -frequency[term])
        colors = {term: COLORS[i % len(COLORS)] for i, term in enumerate(terms)}
        _draw_terms(axes, raw, weighted, colors)
        axes.set_title(shorten(row_label(row)), loc="left", pad=18)
        for epoch in phase_ends[row]:
            axes.axvline(epoch + 0.5, color=INK, linewidth=0.8, linestyle=":")
    for axes in panels[len(losses) :]:
        axes.set_visible(False)
    return figure


def _draw_curve(
    axes: Axes, curve: Curve, color: str, dashes: Any = "-", *, at: Sequence[float] | None = None
) -> None:
    places = curve.epochs if at is None else at
    marker = "o" if len(places) == 1 else None  # a line of a single point is invisible
    axes.plot(places, curve.mean, color=color, ls=dashes, lw=1.4, marker=marker)
    if any(curve.std):
        axes.fill_between(places, curve.low, curve.high, color=color, alpha=BAND, linewidth=0)


def _band_legend(curves: Iterable[Curve]) -> list[Patch]:
    """Return what the legend says of the bands, if any of the curves has one."""
    if not any(any(curve.std) for curve in curves):
        return []
    return [Patch(color=INK, alpha=BAND, linewidth=0, label="± std over seeds")]


def _values_from(start: float, places: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return what a line shows from ``start`` on: its interpolated value there, and its points."""
    points = zip(places, values, strict=True)
    return [
        float(np.interp(start, places, values)),
        *(value for place, value in points if place >= start),
    ]


def _draw_terms(
    axes: Axes,
    raw: Mapping[str, Curve],
    weighted: Mapping[str, Curve],
    colors: Mapping[str, str],
) -> None:
    for terms, dashes in ((raw, "-"), (weighted, DASHES[1])):
        for term, curve in terms.items():
            _draw_curve(axes, curve, colors[term], dashes)
    curves = (*raw.values(), *weighted.values())
    if all(value > 0 for curve in curves for value in curve.mean):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        few_decades = high < 1000 * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if few_decades else (1,), numticks=6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    handles = [Patch(color=color, label=shorten(term)) for term, color in colors.items()]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.03, 0.96),  # between the panel and its title
        ncols=max(len(handles), 1),
        fontsize=8,
        handlelength=0.8,
        columnspacing=0.8,
    )
    axes.set_xlabel("epoch, all phases", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_ends(axes: Axes, rows: Sequence[RowKey], curves: Mapping[RowKey, Curve]) -> None:
    """Label each line at its end, moved up or down so that no two labels overlap."""
    low, high = axes.get_ylim()
    ends = {row: (curve.mean[-1] - low) / (high - low) for row, curve in curves.items()}
    order = sorted(ends, key=lambda row: ends[row])
    places = avoid_overlap([ends[row] for row in order], gap=min(0.05, 1 / len(order)))
    leader: dict[str, Any] = {
        "arrowstyle": "-",
        "linewidth": 1.2,
        "relpos": (0, 0.5),
        "shrinkA": 1,
        "shrinkB": 1,
    }
    for row, place in zip(order, places, strict=True):
        color, dashes = line_style(rows.index(row))
        axes.annotate(
            f"{shorten(row_label(row))}  {curves[row].mean[-1]:.2f}",
            xy=(1, ends[row]),
            xytext=(1.12, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize=9,
            arrowprops=leader | {"color": color, "linestyle": dashes},
        )


def avoid_overlap(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending ``places``, from 0 to 1, moved just enough to be ``gap`` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else 0.0))
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved


def new_figure(title: str, width: float, height: float, legend: Sequence[Artist] = ()) -> Figure:
    """Return an empty figure of that size, in inches, plus space for the title and the legend.

    The layout is set by hand, because matplotlib's automatic layout takes seconds for a figure.
    """
    lines = textwrap.wrap(title, int(width * TITLE_CHARACTERS_PER_INCH))
    top = LINE_HEIGHT * (len(lines) + bool(legend)) + 0.2
    figure = Figure(figsize=(width, height + top))
    x, y = 0.1 / width, 1 - 0.1 / (height + top)
    figure.suptitle("\n".join(lines), x=x, y=y, ha="left", va="top", fontsize=12)
    if legend:
        below = (0, y - LINE_HEIGHT * len(lines) / (height + top))
        figure.legend(handles=legend, loc="upper left", bbox_to_anchor=below, ncols=len(legend))
    figure.subplots_adjust(top=1 - (top + PANEL_TITLE_HEIGHT) / (height + top))
    return figure


def set_margins(figure: Figure, *, left: float, right: float, bottom: float) -> None:
    """Set the other margins, in inches."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=bottom / height)


def shorten(label: str, most: int = LONGEST_LABEL) -> str:
    """Return ``label``, cut to ``most`` characters."""
    return label if len(label) <= most else f"{label[: most - 1]}…"


def longest_label(rows: Iterable[RowKey]) -> int:
    """Return the length of the longest shortened label; ``rows`` must not be empty."""
    return max(len(shorten(row_label(row))) for row in rows)


def line_style(number: int) -> tuple[str, Any]:
    """Return the colour and the dashes of the line with that number; 24 lines differ."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]
