"""The report's figures by name, and as files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sskd.report.canvas import STYLE
from sskd.report.gains import pair_gains
from sskd.report.groups import Group
from sskd.report.metrics import LOSS, WEIGHTED, EpochLine, loss_curves, read_metrics, top1_curve
from sskd.report.plots import draw_curves, draw_gains, draw_losses
from sskd.report.published import Pair
from sskd.report.report import Report
from sskd.report.rows import row_label

LONGEST_NAME = 180  # signs, of a file's name; systems allow 255


def draw_figures(report: Report, warn: Callable[[str], None]) -> dict[str, Figure]:
    """Return the figures by name: ``gain``, ``curves-<pair>`` and ``losses-<pair>``.

    Where the report has several groups of pairs, the group's title stands between the two.
    What there is nothing to draw for is left out; damaged metrics are told to ``warn``.
    """
    metrics = {run.folder: read_metrics(run.folder, warn) for run in report.results}
    groups = report.groups()
    figures: dict[str, Figure] = {}
    with mpl.rc_context(STYLE):
        for group in groups:
            title = [] if len(groups) == 1 else [group.title]
            _warn_of_lengths(group, metrics, warn)
            for kind, pair, figure in _group_figures(group, metrics):
                name = "-".join(map(_slug, [kind, *title, *pair]))
                figures[_unused(name[:LONGEST_NAME], figures)] = figure
    return figures


def as_svg(figure: Figure) -> bytes:
    """Return ``figure`` as an SVG file, byte for byte the same each time."""
    # Without the program and the date there are no addresses in it either.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svg = _render(figure, "svg", metadata=metadata)
    # Where the font of the layout is missing, one like it is better than the serif default.
    return svg.replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")


def as_png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file of 150 dots an inch."""
    return _render(figure, "png", dpi=150)


def _render(figure: Figure, kind: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    salt = {"svg.hashsalt": figure.get_suptitle()}
    with mpl.rc_context(STYLE | salt), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(stream, format=kind, **settings)
    return stream.getvalue()


def _group_figures(
    group: Group, metrics: Mapping[Path, list[EpochLine]]
) -> Iterator[tuple[str, Pair | tuple[()], Figure]]:
    tables = [(table, pair) for table, of in group.pairs_by_table().items() for pair in of]
    gains = {pair: of for table, pair in tables if (of := pair_gains(group, table, pair))}
    rows = sorted({row for of in gains.values() for row in of}, key=group.row_order)
    if rows:
        yield "gain", (), draw_gains(f"Gain in top-1, last epoch · {group.title}", rows, gains)
    pairs = [pair for _, pair in tables]
    rows = sorted({row for pair in pairs for row in group.pair_runs(pair)}, key=group.row_order)
    for pair in pairs:
        lines = {
            row: [metrics[run.folder] for run in runs]
            for row, runs in group.pair_runs(pair).items()
        }
        title = f"{pair[0]} → {pair[1]} · {group.title}"
        curves = {row: curve for row, of in lines.items() if (curve := top1_curve(of)).epochs}
        if curves:
            yield "curves", pair, draw_curves(f"Accuracy · {title}", rows, curves)
        losses = {
            row: (loss_curves(of, LOSS), loss_curves(of, WEIGHTED)) for row, of in lines.items()
        }
        losses = {row: both for row, both in losses.items() if any(both)}
        if losses:
            ends = {row: _stage_ends(lines[row][0]) for row in losses}
            yield "losses", pair, draw_losses(f"Loss terms · {title}", losses, ends)


def _warn_of_lengths(
    group: Group, metrics: Mapping[Path, list[EpochLine]], warn: Callable[[str], None]
) -> None:
    """Say which curves end as means of fewer runs, because metrics have been lost."""
    for pair in sorted(group.pairs()):
        for row, runs in group.pair_runs(pair).items():
            lengths = sorted({len(top1_curve([metrics[run.folder]]).epochs) for run in runs})
            if len(lengths) > 1:
                counts = " or ".join(map(str, lengths))
                warn(
                    f"{group.title}, {'-'.join(pair)}, {row_label(row)}: its runs have {counts}"
                    " epochs of metrics, so not every epoch of its curve is a mean of all"
                )


def _stage_ends(lines: list[EpochLine]) -> list[int]:
    """Return the numbers of the epochs, counted through, after which the stage changes."""
    changes = enumerate(pairwise(line.stage for line in lines), start=1)
    return [number for number, (before, after) in changes if before != after]


def _slug(text: str) -> str:
    """Return ``text`` as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.=]+", "-", text).strip("-.") or "x"


def _unused(name: str, taken: dict[str, Figure]) -> str:
    number = 1
    unused = name
    while unused in taken:
        number += 1
        unused = f"{name}-{number}"
    return unused
