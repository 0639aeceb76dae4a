"""Draw studies: top-1 against the value of a setting, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from sskd.report.groups import Entry
from sskd.report.plots import (
    CHARACTER_WIDTH,
    INK,
    PANEL_TITLE_HEIGHT,
    PAPER,
    line_style,
    longest_label,
    new_figure,
    set_margins,
    shorten,
)
from sskd.report.published import RowKey, row_label
from sskd.report.published_studies import PublishedLine, Value, value_text
from sskd.report.studies import Study
from sskd.report.study_tables import best_by_holdout, study_entry

# The dashes and the marker of published lines, by source.
PUBLISHED_STYLES = (((0, (4, 3)), "o"), ((0, (1.5, 2)), "s"), ((0, (5, 2, 1, 2)), "D"))
LEFT, AXIS_WIDTH, LABEL_GAP = 0.8, 5.6, 0.05  # inches
LOGARITHMIC = 10.0  # the ratio of the largest value to the least from which the axis is logarithmic


@dataclass(frozen=True)
class _Axis:
    """The places of the values on the axis."""

    study: Study

    @property
    def is_logarithmic(self) -> bool:
        values = [value for value in self.study.values if isinstance(value, float)]
        return (
            self.study.is_numeric and min(values) > 0 and max(values) >= LOGARITHMIC * min(values)
        )

    def place(self, value: Value) -> float:
        """Return the place of ``value``: a number itself, a name's number in the order."""
        return value if isinstance(value, float) else float(self.study.values.index(value))

    @property
    def labels(self) -> list[str]:
        """The label of each value, of one or two lines."""
        recipe = self.study.recipe_value
        return [
            value_text(value) + ("\nrecipe" if value == recipe else "")
            for value in self.study.values
        ]

    @property
    def is_crowded(self) -> bool:
        """Whether labels beside each other would touch."""
        places = [self.place(value) for value in self.study.values]
        if self.is_logarithmic:
            places = [math.log10(place) for place in places]
        # Matplotlib leaves a twentieth of the range on both sides of numbers.
        span = 1.1 * (places[-1] - places[0]) if self.study.is_numeric else len(places)
        widths = [CHARACTER_WIDTH * max(map(len, label.split("\n"))) for label in self.labels]
        return any(
            AXIS_WIDTH * (right - left) < span * (sum(pair) / 2 + LABEL_GAP)
            for (left, right), pair in zip(pairwise(places), pairwise(widths), strict=True)
        )


def draw_study(study: Study) -> Figure:
    """Return the figure of ``study`` at the last epoch.

    Error bars are one sample standard deviation over seeds. Published lines are dashed and have
    hollow markers. A star is the line's best value by the accuracy on held-out images.
    """
    sources = list(dict.fromkeys(line.by for found in study.published.values() for line in found))
    handles = _legend(study, sources)
    names = max(longest_label(study.lines), *(len(str(h.get_label())) for h in handles))
    right = 0.75 + CHARACTER_WIDTH * 1.1 * names
    height = max(3.8, 0.9 + 0.23 * len(handles))
    title = f"Study of {study.key} · {study.dataset} · {study.setting_title} · {study.pair_name}"
    figure = new_figure(title, LEFT + AXIS_WIDTH + right, height)
    axes = figure.subplots()
    axis = _Axis(study)
    longest = CHARACTER_WIDTH * max(map(len, axis.labels))
    bottom = 0.5 + longest if axis.is_crowded else 0.75
    set_margins(figure, left=LEFT, right=right, bottom=bottom)
    # The panel has no title of its own.
    unused = (PANEL_TITLE_HEIGHT - 0.1) / figure.get_size_inches()[1]
    figure.subplots_adjust(top=figure.subplotpars.top + unused)
    for number, row in enumerate(study.lines):
        _draw_line(axes, axis, row, number)
        for line in study.published.get(row, ()):
            style = PUBLISHED_STYLES[sources.index(line.by) % len(PUBLISHED_STYLES)]
            _draw_published(axes, axis, line, (line_style(number)[0], *style))
    _set_axis(axes, axis)
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=9)
    return figure


def _draw_line(axes: Axes, axis: _Axis, row: RowKey, number: int) -> None:
    entries = _entries(axis.study, row)
    color, dashes = line_style(number)
    places = [axis.place(value) for value in entries]
    means = [entry.mean for entry in entries.values()]
    axes.errorbar(
        places,
        means,
        yerr=[entry.std or math.nan for entry in entries.values()],
        color=color,
        ls=dashes if axis.study.is_numeric else "none",
        lw=1.4,
        marker="o",
        markersize=5,
        capsize=3,
    )
    best = best_by_holdout(axis.study, row, "last")
    if best in entries:
        place, mean = axis.place(best), entries[best].mean
        axes.plot([place], [mean], marker="*", ms=14, color=color, mec=INK, mew=0.8, ls="none")


def _draw_published(axes: Axes, axis: _Axis, line: PublishedLine, style: Sequence[Any]) -> None:
    color, dashes, marker = style
    order = [value for value in axis.study.values if value in line.top1]
    axes.plot(
        [axis.place(value) for value in order],
        [float(line.top1[value]) for value in order],
        color=color,
        ls=dashes if axis.study.is_numeric else "none",
        lw=1.1,
        marker=marker,
        ms=6,
        mfc=PAPER,
    )


def _entries(study: Study, row: RowKey) -> dict[Value, Entry]:
    found = ((value, study_entry(study, row, value, "last")) for value in study.values)
    return {value: entry for value, entry in found if entry is not None}


def _legend(study: Study, sources: Sequence[str]) -> list[Line2D]:
    handles = []
    for number, row in enumerate(study.lines):
        color, dashes = line_style(number)
        style = dashes if study.is_numeric else "none"
        label = shorten(row_label(row))
        handles.append(Line2D([], [], color=color, ls=style, marker="o", ms=5, label=label))
    for number, source in enumerate(sources):
        dashes, marker = PUBLISHED_STYLES[number % len(PUBLISHED_STYLES)]
        style = {"ls": dashes if study.is_numeric else "none", "marker": marker, "mfc": PAPER}
        handles.append(Line2D([], [], color=INK, lw=1.1, label=f"published ({source})", **style))
    if any(best_by_holdout(study, row, "last") is not None for row in study.lines):
        label = "best by the held-out images"
        handles.append(Line2D([], [], color=INK, marker="*", ms=11, ls="none", label=label))
    return handles


def _set_axis(axes: Axes, axis: _Axis) -> None:
    study = axis.study
    places = [axis.place(value) for value in study.values]
    if axis.is_logarithmic:
        axes.set_xscale("log")
    elif not study.is_numeric:
        axes.set_xlim(-0.5, len(places) - 0.5)
    if axis.is_crowded:
        labels = [label.replace("\n", ", ") for label in axis.labels]
        axes.set_xticks(places, labels, rotation="vertical")
    else:
        axes.set_xticks(places, axis.labels)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(study.key)
    axes.set_ylabel("top-1 on the test set, %")
