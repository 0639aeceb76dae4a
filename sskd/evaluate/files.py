"""Write the files of ``--out``: figures as JSON, tables as markdown, plots."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import sskd
from sskd.errors import UserError
from sskd.evaluate.evaluation import Evaluation
from sskd.evaluate.render import as_markdown
from sskd.files import read_bounded_text, write_atomically

SUFFIXES = (".json", ".md", ".png")
PLOTS = ("reliability", "classes", "confusions")
MOST_JSON = 2**26  # bytes of an earlier file

# What an evaluation is of. Only an evaluation of the same may replace its files.
Subject = dict[str, Any]


def base_path(out: str) -> Path:
    """Return the path with which the names of all files begin.

    Raises:
        UserError: ``out`` is a folder.
    """
    base = Path(out)
    if base.suffix in SUFFIXES:
        base = base.with_suffix("")
    if not base.name or base.is_dir():
        raise UserError(f"--out '{out}' is a folder; name a file in it, such as '{base / 'net'}'")
    return base


def refuse_other_files(base: Path, subjects: Sequence[Subject]) -> None:
    """Refuse to replace files that are not an evaluation of ``subjects``.

    Raises:
        UserError: there are such files, or the folder is not writable.
    """
    folder = next(each for each in base.absolute().parents if each.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--out '{base}': cannot write in {folder}; name another file with --out")
    path = base.with_name(f"{base.name}.json")
    advice = "name another file with --out, or remove it"
    if path.exists():
        try:
            content = json.loads(read_bounded_text(path, MOST_JSON))
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


def write_files(
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
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(base.with_name(name), methodcaller("write", data))
    except OSError as error:
        raise UserError(f"--out '{base}': cannot write there ({error})") from error
    return [base.with_name(name) for name in files]


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
