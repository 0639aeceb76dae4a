"""The first half hour on a GPU: three commands, which can be stopped at any time.

    python -m benchmarks.gpu agree --out gpu
    python -m benchmarks.gpu throughput --out gpu
    python -m benchmarks.gpu train --out gpu --set dataset.root=data

``agree`` compares the training step of each method and phase with the same step on the CPU, and a
CUDA graph with the steps that it replaces. ``throughput`` measures the time of a step, alone and
with several jobs side by side, and compares it with the targets. ``train`` trains the runs of a
list.

A command writes OUT/COMMAND.jsonl, a line for each finished row, and the table OUT/COMMAND.md after
each row. It ends after ``--minutes``; the same command later continues with the rows that are left.
docs/gpu.md says what a machine needs for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.gpu import agree, runs, speed, targets, tolerances
from benchmarks.gpu.rows import Command, measure_rows, row_file
from sskd.commands.process import run_tool
from sskd.errors import Interrupted
from sskd.methods import METHODS
from sskd.models import ARCHITECTURES
from sskd.output import complain
from sskd.precision import PRECISIONS
from sskd.training.signals import raise_on_sigterm

COMMANDS = {
    "agree": Command(agree.measurements, agree.settings, tolerances.table),
    "throughput": Command(speed.measurements, speed.settings, targets.table),
    "train": Command(runs.measurements, runs.settings, runs.table, measure=runs.measure),
}


def main() -> int:
    """Carry out the commands that the command line names; return the exit status."""
    return run_tool(lambda: run(parse_options()))


def run(options: argparse.Namespace) -> int:
    """Carry out the commands one after the other; return the exit status, 128 + n by signal n.

    Raises:
        UserError: the rows of one of them were measured with other settings.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.commands:  # before the first one takes minutes
        row_file(name, COMMANDS[name], options).read(retry=options.retry)
    title = f"Batch {options.batch}, {harness.machine_of(options)}"
    try:
        with raise_on_sigterm():
            for name in options.commands:
                measure_rows(name, COMMANDS[name], options, title)
    except Interrupted as stop:
        complain(f"{stop}: the finished rows are written; the same command continues")
        return 128 + stop.signum
    return 0


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "commands", nargs="+", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS)
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="of each command")
    parser.add_argument("--retry", action="store_true", help="repeat rows that failed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--images", type=int, default=50_000, help="training images")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "tf32", "fp32"]
    )
    agreement = parser.add_argument_group("agree")
    agreement.add_argument("--agree-pair", default="resnet56-resnet20", metavar="TEACHER-STUDENT")
    agreement.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    agreement.add_argument("--teachers", nargs="+", choices=ARCHITECTURES, default=agree.TEACHERS)
    rate = parser.add_argument_group("throughput")
    rate.add_argument("--pairs", nargs="+", default=list(speed.PAIRS), metavar="TEACHER-STUDENT")
    rate.add_argument(
        "--grid-pairs", nargs="*", default=speed.grid_pairs(), metavar="TEACHER-STUDENT"
    )
    rate.add_argument("--works", nargs="+", choices=speed.WORKS, default=list(speed.WORKS))
    rate.add_argument("--modes", nargs="+", choices=speed.MODES, default=list(speed.MODES))
    rate.add_argument("--jobs", nargs="+", type=int, default=[1, 2, 4, 8], help="side by side")
    rate.add_argument("--rounds", type=int, default=5)
    rate.add_argument("--steps", type=int, default=40, help="steps of a round")
    rate.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    training = parser.add_argument_group("train")
    training.add_argument("--runs", type=Path, help="a file with a run in each line (docs/gpu.md)")
    training.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    parser.set_defaults(compile="off", graph="auto", precompute=False)
    return harness.parse(parser)


if __name__ == "__main__":
    sys.exit(main())
