"""The picture of figure 5: differences of the correlations of classifiers' weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from sskd.report.plots import STYLE, new_figure, set_margins, shorten
from sskd.similarity.classifiers import mean_difference
from sskd.similarity.table import Summary

COLUMNS = 6
PANEL, GAP, BAR = 1.7, 0.55, 1.0  # inches: a panel's side, between panels, for the colour bar
COLORMAP = "viridis"
TOP_SHARE = 0.995  # of all entries is within the colour scale, so that few do not hide the others


def draw_differences(title: str, summaries: Sequence[Summary]) -> Figure:
    """Return a heat map [C, C] for each row, all in the same colours.

    ``summaries`` without a difference are left out; one has one.
    """
    shown = [(each, each.difference) for each in summaries if each.difference is not None]
    several = len({each.row.networks for each, _ in shown}) > 1
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    most = max(difference.quantile(TOP_SHARE).item() for _, difference in shown)
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        width = max(columns * (PANEL + GAP) + BAR, 6)
        figure = new_figure(title, width, lines * (PANEL + GAP) + 0.15)
        panels = figure.subplots(lines, columns, squeeze=False)
        set_margins(figure, left=0.35, right=BAR, bottom=0.3)
        figure.subplots_adjust(wspace=0.25, hspace=GAP / PANEL)
        for axes, (each, difference) in zip(panels.flat, shown, strict=False):
            image = axes.imshow(difference.numpy(), cmap=COLORMAP, vmin=0, vmax=most or 1.0)
            mean = mean_difference(difference)
            label = shorten(" ".join([each.row.networks] * several + [each.row.method]))
            axes.set_title(f"{label}\nmean {mean:.4f}", loc="left", fontsize=9)
            axes.tick_params(labelsize=7)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        bar = figure.add_axes((1 - 0.75 / width, 0.2, 0.15 / width, 0.55))
        figure.colorbar(image, cax=bar, extend="max", label="absolute difference")
        bar.tick_params(labelsize=8)
    return figure
