"""Write the files of ``--out``: figures as JSON, tables as markdown, plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sskd
from sskd.errors import UserError
from sskd.evaluate.evaluation import Evaluation
from sskd.evaluate.render import as_markdown
from sskd.files import read_bounded_text
from sskd.measuring.files import MOST_BYTES, write_files

SUFFIXES = (".json", ".md", ".png")
PLOTS = ("reliability", "classes", "confusions")

# What an evaluation is of. Only an evaluation of the same may replace its files.
Subject = dict[str, Any]


def refuse_other_files(base: Path, subjects: Sequence[Subject]) -> None:
    """Raise UserError if files of these names exist that are not an evaluation of ``subjects``."""
    path = base.with_name(f"{base.name}.json")
    advice = "name another file with --out, or remove it"
    if path.exists():
        try:
            content = json.loads(read_bounded_text(path, MOST_BYTES))
            found = [network["subject"] for network in content["networks"]]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            found = None
        if found != list(subjects):
            raise UserError(f"{path} exists and is not of the same evaluation; {advice}")
        return
    plots = [f"{name}-{kind}.png" for name in _plot_bases(base, len(subjects)) for kind in PLOTS]
    for other in map(base.with_name, (f"{base.name}.md", *plots)):
        if other.exists():
            raise UserError(f"{other} exists without {path.name} of this command; {advice}")


def write_evaluations(
    base: Path, evaluations: Sequence[Evaluation], subjects: Sequence[Subject]
) -> list[Path]:
    """Write ``base``.json, .md and the plots, and return their paths.

    Raises:
        UserError: a file cannot be written.
    """
    networks = [
        {"subject": subject, **evaluation.to_json()}
        for subject, evaluation in zip(subjects, evaluations, strict=True)
    ]
    content = {"sskd_evaluate": sskd.__version__, "networks": networks}
    plots = list(map(plot_files, _plot_bases(base, len(evaluations)), evaluations))
    files = {
        f"{base.name}.json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        f"{base.name}.md": as_markdown(evaluations, [list(each) for each in plots]).encode(),
        **{name: png for each in plots for name, png in each.items()},
    }
    return write_files({base.with_name(name): data for name, data in files.items()})


def _plot_bases(base: Path, count: int) -> list[str]:
    """Return with what the names of the plots of each of ``count`` networks begin."""
    if count == 1:
        return [base.name]
    return [f"{base.name}-{number}" for number in range(1, count + 1)]


def plot_files(base: str, evaluation: Evaluation) -> dict[str, bytes]:
    """Return the plots of ``evaluation`` as PNG, by the names of their files."""
    # Importing matplotlib takes longer than everything else here, and only these files need it.
    from sskd.evaluate.plots import draw_plots
    from sskd.report.figures import as_png

    figures = draw_plots(evaluation)
    return {f"{base}-{name}.png": as_png(figure) for name, figure in figures.items()}
