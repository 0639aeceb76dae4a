"""Draw the report's plots: gains, accuracy curves, loss terms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from sskd.report.canvas import (
    DASHES,
    HUES,
    INK,
    SIGN,
    line_style,
    longest_label,
    new_figure,
    set_margins,
    shorten,
)
from sskd.report.gains import REFERENCES, Gain
from sskd.report.metrics import Curve
from sskd.report.published import Pair
from sskd.report.rows import RowKey, row_label

Gains = Mapping[RowKey, Mapping[RowKey, Gain]]


def draw_gains(title: str, rows: Sequence[RowKey], gains: Mapping[Pair, Gains]) -> Figure:
    """Return a panel for each pair, with a bar for each of ``rows`` and reference."""
    columns = min(4, len(gains))
    lines = math.ceil(len(gains) / columns)
    labels = [shorten(row_label(row)) for row in rows]
    left = 0.4 + SIGN * longest_label(rows)
    hues = dict(zip(REFERENCES, HUES, strict=False))
    legend = [Patch(color=hues[key], label=text) for key, text in REFERENCES.items()]
    panel = 0.3 * len(rows)
    figure = new_figure(title, max(2.6 * columns + left, 6), lines * (panel + 1.1), legend)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    set_margins(figure, left=left, right=0.15, bottom=0.55)
    figure.subplots_adjust(wspace=0.08, hspace=1.1 / panel)
    for axes, (pair, found) in zip(panels, gains.items(), strict=False):
        for number, reference in enumerate(REFERENCES):
            bars = {row: of[reference] for row, of in found.items() if reference in of}
            axes.barh(
                [rows.index(row) + 0.38 * (number - 0.5) for row in bars],
                [bar.points for bar in bars.values()],
                xerr=[math.nan if bar.std is None else bar.std for bar in bars.values()],
                height=0.36,
                color=hues[reference],
                error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title("\n→ ".join(map(shorten, pair)), loc="left")
        axes.set_xlabel("points of top-1")
        axes.tick_params(labelbottom=True)
        axes.set_yticks(range(len(rows)), labels)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    for axes in panels[len(gains) :]:
        axes.set_visible(False)
    return figure


def draw_curves(title: str, rows: Sequence[RowKey], curves: Mapping[RowKey, Curve]) -> Figure:
    """Return top-1 against the epoch, whole and its last quarter, a line for each row.

    ``rows`` are all that the group has, so that a row looks the same beside every pair.
    """
    figure = new_figure(title, 13, 4.8)
    whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
    set_margins(figure, left=0.6, right=1.6 + SIGN * longest_label(curves), bottom=0.55)
    figure.subplots_adjust(wspace=0.12)
    last = max(curve.epochs[-1] for curve in curves.values())
    shown = []
    for row, curve in curves.items():
        for axes in (whole, end):
            _draw_curve(axes, curve, *line_style(rows.index(row)))
        points = zip(curve.epochs, curve.mean, strict=True)
        shown += [curve.mean[-1], *(top1 for epoch, top1 in points if epoch >= 0.75 * last)]
    margin = 0.05 * (max(shown) - min(shown)) + 0.1
    end.set_ylim(min(shown) - margin, max(shown) + margin)
    end.set_xlim(0.75 * last, last)
    whole.set_xlim(0, last)
    whole.set_title("all epochs", loc="left")
    end.set_title("the last quarter", loc="left")
    whole.set_ylabel("top-1 on the test set, %")
    for axes in (whole, end):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(end, rows, curves)
    return figure


def draw_losses(
    title: str,
    losses: Mapping[RowKey, tuple[Mapping[str, Curve], Mapping[str, Curve]]],
    stage_ends: Mapping[RowKey, Sequence[int]],
) -> Figure:
    """Return a panel for each row: its loss terms by epoch of all stages, as such and weighted.

    ``losses`` has both; ``stage_ends`` are the epochs after which another stage begins.
    """
    columns = min(4, len(losses))
    lines = math.ceil(len(losses) / columns)
    styles = {"as computed": "-", "weighted": DASHES[1], "another stage begins": ":"}
    legend = [Line2D([], [], color=INK, ls=dash, label=text) for text, dash in styles.items()]
    figure = new_figure(title, max(3.2 * columns + 0.2, 6), 2.6 * lines, legend)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    set_margins(figure, left=0.6, right=0.15, bottom=0.5)
    figure.subplots_adjust(wspace=0.25, hspace=0.6)
    common = Counter(term for raw, _ in losses.values() for term in raw)
    for axes, (row, (raw, weighted)) in zip(panels, losses.items(), strict=False):
        # What many methods share comes first, and so has the same colour everywhere.
        terms = sorted({**raw, **weighted}, key=lambda term: -common[term])
        hues = {term: HUES[i % len(HUES)] for i, term in enumerate(terms)}
        _draw_terms(axes, raw, weighted, hues)
        axes.set_title(shorten(row_label(row)), loc="left", pad=18)
        for epoch in stage_ends[row]:
            axes.axvline(epoch + 0.5, color=INK, linewidth=0.8, linestyle=":")
    for axes in panels[len(losses) :]:
        axes.set_visible(False)
    return figure


def _draw_curve(axes: Axes, curve: Curve, hue: str, dashes: Any = "-") -> None:
    marker = "o" if len(curve.epochs) == 1 else None  # a single point has no line
    axes.plot(curve.epochs, curve.mean, color=hue, ls=dashes, lw=1.4, marker=marker)
    if any(curve.std):
        low = [mean - std for mean, std in zip(curve.mean, curve.std, strict=True)]
        high = [mean + std for mean, std in zip(curve.mean, curve.std, strict=True)]
        axes.fill_between(curve.epochs, low, high, color=hue, alpha=0.18, linewidth=0)


def _draw_terms(
    axes: Axes,
    raw: Mapping[str, Curve],
    weighted: Mapping[str, Curve],
    hues: Mapping[str, str],
) -> None:
    for of, dashes in ((raw, "-"), (weighted, DASHES[1])):
        for term, curve in of.items():
            _draw_curve(axes, curve, hues[term], dashes)
    curves = (*raw.values(), *weighted.values())
    if all(value > 0 for curve in curves for value in curve.mean):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        few_decades = high < 1000 * low
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if few_decades else (1,), numticks=6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    handles = [Patch(color=hue, label=shorten(term)) for term, hue in hues.items()]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.03, 0.96),  # between the panel and its title
        ncols=max(len(handles), 1),
        fontsize=8,
        handlelength=0.8,
        columnspacing=0.8,
    )
    axes.set_xlabel("epoch, all stages", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _label_ends(axes: Axes, rows: Sequence[RowKey], curves: Mapping[RowKey, Curve]) -> None:
    """Name each line at its end, moved up or down so that no two names overlap."""
    low, high = axes.get_ylim()
    ends = {row: (curve.mean[-1] - low) / (high - low) for row, curve in curves.items()}
    order = sorted(ends, key=lambda row: ends[row])
    places = spread_out([ends[row] for row in order], gap=min(0.05, 1 / len(order)))
    leader: dict[str, Any] = {
        "arrowstyle": "-",
        "linewidth": 1.2,
        "relpos": (0, 0.5),
        "shrinkA": 1,
        "shrinkB": 1,
    }
    for row, place in zip(order, places, strict=True):
        hue, dashes = line_style(rows.index(row))
        axes.annotate(
            f"{shorten(row_label(row))}  {curves[row].mean[-1]:.2f}",
            xy=(1, ends[row]),
            xytext=(1.12, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=hue,
            va="center",
            fontsize=9,
            arrowprops=leader | {"color": hue, "linestyle": dashes},
        )


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending ``places``, from 0 to 1, moved as far as they must to lie ``gap`` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else 0.0))
    ceiling = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
