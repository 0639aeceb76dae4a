"""The picture of figure 5: differences of the correlations of classifiers' weights."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from sskd.measuring.rows import picture_labels
from sskd.report.figures import as_png
from sskd.report.plots import STYLE, new_figure, set_margins, shorten
from sskd.similarity.classifiers import mean_difference
from sskd.similarity.table import Summary

COLUMNS = 6
PANEL, GAP, BAR = 1.7, 0.7, 1.0  # inches: a panel's side, between panels, for the colour bar
COLORMAP = "viridis"
TOP_SHARE = 0.995  # of a panel's entries


def draw_differences(title: str, summaries: Sequence[Summary]) -> Figure:
    """Return a heat map [C, C] for each row, all in the same colours.

    The scale ends where ``TOP_SHARE`` of the entries of the median panel are below, so that a row
    with far larger differences does not hide the others.

    Args:
        summaries: at least one must have a difference; those without one are left out.
    """
    shown = [(each, each.difference) for each in summaries if each.difference is not None]
    labels = picture_labels([each.row for each, _ in shown], always=("method",))
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    most = statistics.median(difference.quantile(TOP_SHARE).item() for _, difference in shown)
    scale: dict[str, Any] = {"vmin": 0, "vmax": most or 1.0, "interpolation": "nearest"}
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        width = max(columns * (PANEL + GAP) + BAR, 6)
        figure = new_figure(title, width, lines * (PANEL + GAP) + 0.15)
        panels = figure.subplots(lines, columns, squeeze=False)
        set_margins(figure, left=0.35, right=BAR, bottom=0.3)
        figure.subplots_adjust(wspace=0.25, hspace=GAP / PANEL)
        for axes, label, (_, difference) in zip(panels.flat, labels, shown, strict=False):
            image = axes.imshow(difference.numpy(), cmap=COLORMAP, **scale)
            mean = mean_difference(difference)
            axes.set_title(f"{shorten(label)}\nmean {mean:.4f}", loc="left", fontsize=9)
            axes.tick_params(labelsize=7)
        for axes in panels.flat[len(shown) :]:
            axes.set_visible(False)
        bar = figure.add_axes((1 - 0.75 / width, 0.2, 0.15 / width, 0.55))
        figure.colorbar(image, cax=bar, extend="max", label="absolute difference")
        bar.tick_params(labelsize=8)
    return figure


def as_small_png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file of 256 colours, a fifth of the size of one in full colour."""
    image = Image.open(io.BytesIO(as_png(figure))).convert("RGB")
    stream = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return stream.getvalue()
