"""Choose the report's figures, average their curves over seeds, and save them as files."""

from __future__ import annotations

import io
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from sskd.report.groups import Group, pair_gains
from sskd.report.metrics import read_metrics
from sskd.report.plots import STYLE, Curve, draw_curves, draw_gains, draw_losses
from sskd.report.published import Pair, row_label
from sskd.report.report import Report
from sskd.report.results import Warn
from sskd.report.study_plots import draw_study
from sskd.runs.epoch_line import EpochLine

TEST_TOP1 = "test/top1"
LOSS, WEIGHTED = "loss/", "weighted/"  # prefixes of the metrics of loss terms
LONGEST_NAME = 180  # characters of a file's name; systems allow 255
Metrics = Mapping[Path, list[EpochLine]]  # by the folder of the run


def draw_figures(report: Report, warn: Warn) -> dict[str, Figure]:
    """Return the figures by name: gains, curves and losses of pairs, and studies.

    The names are ``gain``, ``curves-<pair>``, ``losses-<pair>`` and ``study-<pair>-<key>``. If the
    report has several groups of pairs, the first three contain the title of the group too.
    Figures without data are left out. Malformed metrics are reported through ``warn``.
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
        names = Counter((study.pair_name, study.key) for study in report.studies)
        for study in report.studies:
            one = names[study.pair_name, study.key] == 1
            title = [] if one else [study.dataset, study.setting_title]
            name = "-".join(map(_slug, ["study", *title, study.pair_name, study.key]))
            figures[_unused(name[:LONGEST_NAME], figures)] = draw_study(study)
    return figures


def as_svg(figure: Figure) -> bytes:
    """Return ``figure`` as an SVG file, the same bytes each time."""
    # Without the program and the date the file contains no addresses either.
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    svg = _save(figure, "svg", metadata=metadata)
    # On a machine without the font, a similar one is better than the serif default.
    return svg.replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif")


def as_png(figure: Figure) -> bytes:
    """Return ``figure`` as a PNG file of 150 dots per inch."""
    return _save(figure, "png", dpi=150)


def top1_curve(runs: Iterable[Iterable[EpochLine]]) -> Curve:
    """Return the top-1 on the test set, in percent, by epoch of the phase that is evaluated."""
    return _average(
        {
            line.epoch: line.metrics[TEST_TOP1]
            for line in lines
            if 0 <= line.metrics.get(TEST_TOP1, -1) <= 100
        }
        for lines in runs
    )


def loss_curves(runs: Sequence[Sequence[EpochLine]], prefix: str) -> dict[str, Curve]:
    """Return the curve of each loss term, with epochs counted through all phases of the run.

    ``prefix`` is ``LOSS`` or ``WEIGHTED``; the keys are the terms without it.
    """
    names = (name for lines in runs for line in lines for name in line.metrics)
    terms = dict.fromkeys(name for name in names if name.startswith(prefix))
    return {
        term.removeprefix(prefix): _average(
            {
                number: line.metrics[term]
                for number, line in enumerate(lines, start=1)
                if term in line.metrics
            }
            for lines in runs
        )
        for term in terms
    }


def _average(runs: Iterable[Mapping[int, float]]) -> Curve:
    values: dict[int, list[float]] = {}
    for by_epoch in runs:
        for epoch, value in by_epoch.items():
            values.setdefault(epoch, []).append(value)
    epochs = tuple(sorted(values))
    return Curve(
        epochs,
        mean=tuple(statistics.fmean(values[epoch]) for epoch in epochs),
        std=tuple(
            statistics.stdev(values[epoch]) if len(values[epoch]) > 1 else 0.0 for epoch in epochs
        ),
    )


def _save(figure: Figure, kind: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    salt = {"svg.hashsalt": figure.get_suptitle()}
    with mpl.rc_context(STYLE | salt), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(stream, format=kind, **settings)
    return stream.getvalue()


def _group_figures(
    group: Group, metrics: Metrics
) -> Iterator[tuple[str, Pair | tuple[()], Figure]]:
    """Yield the kind, the pair (empty for all pairs) and the figure."""
    tables = [(table, pair) for table, pairs in group.pairs_by_table().items() for pair in pairs]
    by_pair = {pair: pair_gains(group, table, pair) for table, pair in tables}
    gains = {pair: by_row for pair, by_row in by_pair.items() if by_row}
    rows = sorted({row for by_row in gains.values() for row in by_row}, key=group.row_order)
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
        curves = {row: curve for row, runs in lines.items() if (curve := top1_curve(runs)).epochs}
        if curves:
            yield "curves", pair, draw_curves(f"Accuracy · {title}", rows, curves)
        losses = {
            row: (loss_curves(runs, LOSS), loss_curves(runs, WEIGHTED))
            for row, runs in lines.items()
        }
        losses = {row: both for row, both in losses.items() if any(both)}
        if losses:
            ends = {row: _phase_ends(lines[row][0]) for row in losses}
            yield "losses", pair, draw_losses(f"Loss terms · {title}", losses, ends)


def _warn_of_lengths(group: Group, metrics: Metrics, warn: Warn) -> None:
    """Warn of curves whose ends are means of fewer runs, because metrics were lost."""
    for pair in sorted(group.pairs()):
        for row, runs in group.pair_runs(pair).items():
            lengths = sorted({len(top1_curve([metrics[run.folder]]).epochs) for run in runs})
            if len(lengths) > 1:
                counts = " or ".join(map(str, lengths))
                warn(
                    f"{group.title}, {'-'.join(pair)}, {row_label(row)}: its runs have {counts}"
                    " epochs of metrics, so the end of its curve is a mean of fewer runs"
                )


def _phase_ends(lines: Sequence[EpochLine]) -> list[int]:
    """Return the numbers of the epochs, counted through all phases, that end a phase."""
    changes = enumerate(pairwise(line.phase for line in lines), start=1)
    return [number for number, (before, after) in changes if before != after]


def _slug(text: str) -> str:
    """Return ``text`` as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.=]+", "-", text).strip("-.") or "x"


def _unused(name: str, taken: Mapping[str, Figure]) -> str:
    number = 1
    unused = name
    while unused in taken:
        number += 1
        unused = f"{name}-{number}"
    return unused
