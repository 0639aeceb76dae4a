"""The command ``python -m sskd.report``."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from sskd.errors import UserError, mask_unprintable, shortened
from sskd.invocation.extensions import load_extensions
from sskd.invocation.names import command_line, tool_command, tool_parser
from sskd.output import complain, output_status, reader_has_gone, say, steady_output
from sskd.report.files import write_files
from sskd.report.render import count_states, render_status, render_text
from sskd.report.report import Report, read_report
from sskd.report.results import Epoch, Warn
from sskd.runs.names import RESULT

DESCRIPTION = """\
Show the results of all finished runs in the layout of the published tables: one
table per dataset and setting, a column per pair of teacher and student, a row
per method. Runs with other settings of the method or a teacher from a file have
their own rows. Runs that differ only in one number share a table with a column for
each value. On CIFAR-100 and ImageNet the published value is shown beneath the
measured one if the experiment is the same.
"""
EXAMPLES = """\
examples:
  {command}                        the tables of all runs under runs/
  {command} runs/cifar100 --best   of one dataset, at the best epoch
  {command} --status               what each job of a sweep is doing
  {command} --watch                tables and status, refreshed every 30 seconds
  {command} --wandb                also log the report to Weights & Biases
  {command} --out results/grid     also write results/grid.html, ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with ``argv`` (default: the process's) and return its exit status."""
    with steady_output():
        return _run(_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    run = _show if arguments.watch is None else _watch
    try:
        load_extensions()
        run(arguments)
    except UserError as error:
        _complain("error", str(error))
        return 1
    except KeyboardInterrupt:
        complain("\nstopped")
        return 130
    except OSError as error:
        _complain("error", f"{error.filename or arguments.runs}: {error.strerror}")
        return 1
    return output_status()


def _show(arguments: argparse.Namespace) -> None:
    warn = _Warner()
    report = read_report(Path(arguments.runs), warn)
    if not (report.jobs if arguments.status else report.results):
        raise UserError(
            f"no finished run: no readable {RESULT} under '{arguments.runs}'; train a network"
            f" with '{command_line('teacher')} dataset=digits arch=resnet20', or name the folder of"
            f" the runs: '{tool_command('report')} RUNS'"
        )
    written = _write(report, arguments, warn)
    _say(_status(report) if arguments.status else _tables(report, arguments))
    if not arguments.status and report.unfinished():
        say(f"\n{count_states(report.jobs)} (--status lists them)")
    if written:
        _say(f"\n{written}")
    if arguments.wandb is not None:
        _log(report, arguments.wandb, warn)


def _watch(arguments: argparse.Namespace) -> None:
    """Show tables and status, and write the files, repeatedly until Ctrl-C."""
    warn = _Warner()
    before: object = None
    written = ""
    while not reader_has_gone():
        report = read_report(Path(arguments.runs), warn)
        now = (report.results, [(job.folder, job.state) for job in report.jobs])
        if now != before:  # progress alone is not worth the time that the figures take
            written = _write(report, arguments, warn)
        before = now
        parts = ["" if arguments.status else _tables(report, arguments), _status(report), written]
        footer = f"{datetime.now():%H:%M:%S} · {arguments.runs} · Ctrl-C ends\n"
        say("\n".join([*filter(None, parts), footer]), clear_screen=True)
        time.sleep(arguments.watch)


class _Warner:
    """Prints each warning once, although ``--watch`` reads the same files again and again."""

    def __init__(self) -> None:
        self._printed: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._printed:
            self._printed.add(text)
            _complain("warning", text)


def _tables(report: Report, arguments: argparse.Namespace) -> str:
    width = shutil.get_terminal_size().columns
    return "\n".join(render_text(table, width) for table in report.tables(_epoch(arguments)))


def _status(report: Report) -> str:
    now = datetime.now().astimezone()
    return render_status(report.jobs, shutil.get_terminal_size().columns, now)


def _write(report: Report, arguments: argparse.Namespace, warn: Warn) -> str:
    """Write the files of ``--out``, if it is given, and return a line that lists them."""
    if arguments.out is None or not report.results:
        return ""
    paths = write_files(report, arguments.out, _epoch(arguments), warn)
    figures = [path for path in paths if path.suffix in (".svg", ".png")]
    first, *others = (path for path in paths if path not in figures)
    more = f" and {len(figures)} figure files" if figures else ""
    return f"wrote {first}, {', '.join(path.suffix for path in others)}{more}\n"


def _log(report: Report, project: str, warn: Warn) -> None:
    # Importing W&B takes seconds, and only this option needs it.
    from sskd.report.to_wandb import log_report

    entity, _, name = project.rpartition("/")
    log_report(report, name, entity or None, warn)


def _epoch(arguments: argparse.Namespace) -> Epoch:
    return "best" if arguments.best else "last"


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("report", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "runs", metavar="RUNS", nargs="?", default="runs", help="the folder of runs (default: runs)"
    )
    _add_options(parser)
    _add_outputs(parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select what is shown."""
    parser.add_argument(
        "--best",
        action="store_true",
        help="show the best epoch on the test set, as SSKD reports it, not the last epoch",
    )
    parser.add_argument(
        "--status",
        action="store_true",
        help="show what each job is doing instead of the tables; finished jobs are only counted",
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=30.0,
        help="show tables and status (with --status, only that) every SECONDS (default: 30) until"
        " Ctrl-C, and write the files of --out again after a run finishes or changes its state",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that write the report elsewhere."""
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="also write the tables to PATH.md and PATH.tex, the values of both epochs to"
        " PATH.csv, everything as a page to PATH.html, and figures to PATH-NAME.png and .svg",
    )
    parser.add_argument(
        "--wandb",
        metavar="PROJECT",
        nargs="?",
        const="sskd",
        help="also log the tables, the figures and the files of --out to W&B, in PROJECT or"
        " ENTITY/PROJECT (default: sskd); offline without a login",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        message = f"should be a number of seconds (got {shortened(text)})"
        raise argparse.ArgumentTypeError(message) from None
    if not 0 < seconds <= 86_400:
        message = f"must be more than 0 and at most 86400 seconds, a day (got {shortened(text)})"
        raise argparse.ArgumentTypeError(message)
    return seconds


def _complain(kind: str, message: str) -> None:
    """Print one line to stderr, also if the message contains line ends."""
    complain(f"{kind}: {mask_unprintable(message)}")


def _say(lines: str) -> None:
    """Print lines that end with a line end."""
    say(lines.removesuffix("\n"))


if __name__ == "__main__":
    sys.exit(main())
