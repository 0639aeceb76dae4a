"""The command ``python -m sskd.report``."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sskd.errors import UserError
from sskd.report.render import render_csv, render_markdown, render_text
from sskd.report.results import RESULT_FILE, Epoch, Result, read_results
from sskd.report.tables import Table, build_tables
from sskd.storage import write_text

DESCRIPTION = """\
Show what all finished runs reached, in the layout of the published tables: one
table per dataset and setting, a column per pair of teacher and student, a row
per method. Runs that changed something of the method or took a certain teacher
have rows of their own. On CIFAR-100 the published figure stands beneath ours.
"""
EXAMPLES = """\
examples:
  python -m sskd.report                        the tables of all runs under runs/
  python -m sskd.report runs/cifar100 --best   of one dataset, at the best epoch
  python -m sskd.report --out results/grid     also write results/grid.md and .csv
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (the process's by default) and return its exit status."""
    arguments = _parser().parse_args(argv)
    # A terminal that cannot show a sign should show another in its place, not a traceback.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        _report(Path(arguments.runs), "best" if arguments.best else "last", arguments.out)
        sys.stdout.flush()
    except UserError as error:
        _complain("error", str(error))
        return 1
    except BrokenPipeError:
        # The reader (head, a pager) has seen enough: what is left to flush at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _report(runs: Path, epoch: Epoch, out: str | None) -> None:
    results = read_results(runs, lambda text: _complain("warning", text)) if runs.is_dir() else []
    if not results:
        raise UserError(
            f"no finished run: no readable {RESULT_FILE} under '{runs}'; train a network with"
            " 'python train_teacher.py dataset=digits arch=resnet20', or name the folder of the"
            " runs: 'python -m sskd.report RUNS'"
        )
    tables = build_tables(results, epoch)
    written = [] if out is None else _write(out, results, tables)
    width = shutil.get_terminal_size().columns
    print("\n".join(render_text(table, width) for table in tables), end="")
    if written:
        print(f"\nwrote {' and '.join(map(str, written))}")


def _write(out: str, results: list[Result], tables: list[Table]) -> list[Path]:
    base = Path(out)
    if base.suffix in (".md", ".csv"):
        base = base.with_suffix("")
    if not base.name or base.is_dir():
        raise UserError(f"--out '{out}' is a folder; name a file in it, such as '{base / 'grid'}'")
    markdown, figures = (base.with_name(f"{base.name}{suffix}") for suffix in (".md", ".csv"))
    both = [*build_tables(results, "last"), *build_tables(results, "best")]
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        write_text(markdown, "\n".join(["# Results\n", *map(render_markdown, tables)]))
        write_text(figures, render_csv(entry for table in both for entry in table.entries))
    except OSError as error:
        raise UserError(f"--out '{out}': cannot write there ({error})") from error
    return [markdown, figures]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sskd.report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", metavar="RUNS", nargs="?", default="runs", help="the folder of runs (default: runs)"
    )
    parser.add_argument(
        "--best",
        action="store_true",
        help="show the best epoch on the test set, as SSKD reports it, not the last epoch",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="also write the tables to PATH.md, and the figures of both epochs to PATH.csv",
    )
    return parser


def _complain(kind: str, message: str) -> None:
    """Print one line to stderr, whatever the message holds."""
    line = "".join(sign if sign.isprintable() else "?" for sign in message)
    print(f"{kind}: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
