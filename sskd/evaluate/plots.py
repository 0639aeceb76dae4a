"""The plots of an evaluation: reliability diagrams, accuracy by class, confusions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sskd.evaluate.calibration import Calibration
from sskd.evaluate.evaluation import Evaluation
from sskd.evaluate.render import worst_and_best
from sskd.report.plots import (
    CHARACTER_WIDTH,
    COLORS,
    INK,
    PAPER,
    STYLE,
    new_figure,
    set_margins,
    shorten,
)

NAMED_CLASSES = 10  # of the worst and of the best
BAR_HEIGHT = 0.24  # inches


def draw_plots(evaluation: Evaluation) -> dict[str, Figure]:
    """Return the figures ``reliability``, ``classes`` and ``confusions``, if there are any."""
    of = f"{evaluation.network}, {evaluation.dataset} test set"
    with mpl.rc_context(STYLE | {"axes.axisbelow": True}):
        figures = {
            "reliability": draw_reliability(evaluation, of),
            "classes": draw_classes(evaluation, of),
        }
        if evaluation.confusions:
            figures["confusions"] = draw_confusions(evaluation, of)
    return figures


def draw_reliability(evaluation: Evaluation, of: str) -> Figure:
    """Return the reliability diagram before temperature scaling, and after it."""
    scaling = evaluation.calibration
    panels = [("as trained", scaling.before)]
    if scaling.after is not None:
        panels.append((f"logits divided by {scaling.temperature:.3f}", scaling.after))
    legend = [
        Patch(color=COLORS[0], label="accuracy"),
        Patch(facecolor="none", edgecolor=COLORS[1], hatch="////", label="gap to the confidence"),
    ]
    title = f"Reliability · {of}, {scaling.images:,} images"
    figure = new_figure(title, max(4.4 * len(panels), 6), 4.9, legend)
    grid = figure.subplots(2, len(panels), height_ratios=(4, 1), sharex=True, squeeze=False)
    set_margins(figure, left=0.7, right=0.2, bottom=0.55)
    figure.subplots_adjust(hspace=0.12, wspace=0.25)
    for column, (title, found) in enumerate(panels):
        diagram, counts = grid[:, column]
        _draw_bins(diagram, found)
        _draw_counts(counts, found)
        diagram.set_title(f"{title}: ECE {found.ece_percent:.2f} %", loc="left")
    grid[0, 0].set_ylabel("accuracy, %")
    grid[1, 0].set_ylabel("images, %")
    return figure


def _draw_bins(axes: Axes, found: Calibration) -> None:
    axes.plot((0, 100), (0, 100), color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for each in found.bins:
        if each.accuracy_percent is None or each.confidence_percent is None:
            continue
        left, width = each.low_percent, each.high_percent - each.low_percent
        axes.bar(left, each.accuracy_percent, width, align="edge", color=COLORS[0], edgecolor=INK)
        low, high = sorted((each.accuracy_percent, each.confidence_percent))
        axes.bar(
            *(left, high - low, width, low),
            align="edge",
            facecolor="none",
            edgecolor=COLORS[1],
            hatch="////",
            linewidth=0.8,
        )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)


def _draw_counts(axes: Axes, found: Calibration) -> None:
    total = sum(each.images for each in found.bins)
    axes.bar(
        [each.low_percent for each in found.bins],
        [100 * each.images / total for each in found.bins],
        [each.high_percent - each.low_percent for each in found.bins],
        align="edge",
        color=COLORS[6],
        edgecolor=INK,
    )
    axes.set_xlabel("confidence, %")


def draw_classes(evaluation: Evaluation, of: str) -> Figure:
    """Return the accuracy of all classes in order, and the names of the worst and the best."""
    rows, left_out = worst_and_best(evaluation.classes, NAMED_CLASSES)
    names = [shorten(each.name) for each in rows]
    values = [each.top1_percent or 0.0 for each in rows]
    if left_out:
        names.insert(NAMED_CLASSES, f"({left_out} classes)")
        values.insert(NAMED_CLASSES, float("nan"))
    label_width = 0.3 + CHARACTER_WIDTH * max(map(len, names))
    width = label_width + (8.5 if left_out else 5)
    figure = new_figure(f"Accuracy by class · {of}", width, BAR_HEIGHT * len(names) + 0.8)
    panels = figure.subplots(1, 2 if left_out else 1, squeeze=False)[0]
    set_margins(figure, left=0.6 if left_out else label_width, right=0.2, bottom=0.55)
    figure.subplots_adjust(wspace=(label_width + 0.2) / 4)
    _draw_named(panels[-1], names, values)
    panels[-1].set_xlabel("top-1, %")
    panels[-1].set_xlim(0, 108)
    panels[-1].axvline(evaluation.top1_percent, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    which = "the worst and the best" if left_out else "the worst first"
    panels[-1].set_title(f"{which}; dashed: all test images", loc="left")
    if left_out:
        _draw_order(panels[0], evaluation)
    return figure


def _draw_order(axes: Axes, evaluation: Evaluation) -> None:
    known = [each.top1_percent for each in evaluation.classes if each.top1_percent is not None]
    order = sorted(known)
    axes.bar(range(1, len(order) + 1), order, width=1, color=COLORS[0])
    axes.axhline(evaluation.top1_percent, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0.5, len(order) + 0.5)
    axes.set_ylim(0, 100)
    axes.set_title("all classes, the worst first", loc="left")
    axes.set_xlabel("rank of the class")
    axes.set_ylabel("top-1, %")


def draw_confusions(evaluation: Evaluation, of: str) -> Figure:
    """Return the most frequent confusions, as shares of the images of a class."""
    rows = sorted(evaluation.confusions, key=lambda each: -each.percent_of_class)
    names = [f"{shorten(each.label)} → {shorten(each.predicted)}" for each in rows]
    values = [each.percent_of_class for each in rows]
    left = 0.3 + CHARACTER_WIDTH * max(map(len, names))
    figure = new_figure(
        f"Most frequent confusions · {of}", left + 4.5, BAR_HEIGHT * len(names) + 0.8
    )
    axes = figure.subplots()
    set_margins(figure, left=left, right=0.2, bottom=0.55)
    _draw_named(axes, names, values)
    axes.set_title("label → prediction", loc="left")
    axes.set_xlabel("% of the images with this label")
    axes.set_xlim(0, 1.12 * max(values))
    return figure


def _draw_named(axes: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    """Draw a horizontal bar with its value for each of ``names``, the first at the top."""
    bars = axes.barh(range(len(names)), values, height=0.75, color=COLORS[0])
    labels = ["" if value != value else f"{value:.1f}" for value in values]
    behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # hides the dashed line
    axes.bar_label(bars, labels, padding=3, fontsize=8, bbox=behind)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
