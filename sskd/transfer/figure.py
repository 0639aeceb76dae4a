"""The picture of a linear transfer: a point for each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sskd.measuring.rows import picture_labels
from sskd.report.groups import mean_std_n
from sskd.report.plots import (
    COLORS,
    PANEL_TITLE_HEIGHT,
    STYLE,
    new_figure,
    set_margins,
    shorten,
)
from sskd.transfer.table import Summary

CHARACTER = 0.085  # inches, of a label
LONGEST_NAME = 50  # characters: two fifths of the picture are left
PUBLISHED = "D"  # the marker of a published value


def draw_transfer(title: str, summaries: Sequence[Summary]) -> Figure:
    """Return the mean top-1 of each row, with the sample standard deviation over seeds."""
    rows = [each.row for each in summaries]
    names = picture_labels(rows, always=("networks", "method"))
    labels = [shorten(name, LONGEST_NAME) for name in names]
    points = [mean_std_n(each.last) for each in summaries]
    published = [(at, each.published) for at, each in enumerate(summaries) if each.published]
    style: dict[str, Any] = {"color": COLORS[0], "marker": "o"}
    legend: list[Artist] = [Line2D([], [], label="last epoch, mean ± std over seeds", **style)]
    if published:
        marker = Line2D([], [], color=COLORS[1], marker=PUBLISHED, ls="", label="published")
        legend.append(marker)
    with mpl.rc_context(STYLE):
        figure = new_figure(title, 8, 0.3 * len(summaries) + 0.5, legend)
        top = figure.subplotpars.top + (PANEL_TITLE_HEIGHT - 0.15) / figure.get_figheight()
        figure.subplots_adjust(top=top)  # there is no title above the panel
        axes = figure.subplots()
        set_margins(figure, left=0.4 + CHARACTER * max(map(len, labels)), right=0.3, bottom=0.5)
        means = [mean for mean, _, _ in points]
        deviations = [0.0 if std is None else std for _, std, _ in points]
        axes.errorbar(means, range(len(points)), xerr=deviations, ls="", capsize=3, **style)
        for at, mean in enumerate(means):
            place: dict[str, Any] = {
                "xytext": (0, 5),
                "textcoords": "offset points",
                "ha": "center",
            }
            axes.annotate(f"{mean:.2f}", (mean, at), fontsize=8, **place)
        for at, value in published:
            axes.plot(value, at, PUBLISHED, color=COLORS[1], markersize=5)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.8)
        axes.set_xlabel("top-1 on the test part, %")
    return figure
