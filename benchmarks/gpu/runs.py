"""Training runs, one after the other: when the time is up, one stops with its state saved."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from benchmarks.gpu.speed import PAIRS
from benchmarks.gpu.worker import Measurement, Values
from benchmarks.harness import table_head, table_row
from sskd import CONF
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.runs.identity import decides_result

ROOT = CONF.parent
SCRIPTS = {"teacher": "train_teacher.py", "student": "train_student.py"}
SAVE_SECONDS = 60  # for a run that was asked to stop
FIRST_METHODS = ("kd", "sskd")


def default_lines() -> list[str]:
    """Return the teachers of the pairs, then their students, those of KD and SSKD first."""
    teachers = [f"teacher arch={pair.split('-')[0]}" for pair in PAIRS]
    methods = dict.fromkeys([*FIRST_METHODS, *METHODS])
    return [
        *teachers,
        *(f"student pair={pair} method={each}" for each in methods for pair in PAIRS),
    ]


def settings(options: argparse.Namespace) -> Values:
    """Return the settings of all runs that decide their results, on any device."""
    return {"set": [word for word in options.set if decides_result(word.split("=")[0])]}


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, Measurement]]:
    """Yield the run of each line of the list.

    Raises:
        UserError: a line does not begin with ``teacher`` or ``student``.
    """
    lines = options.runs.read_text().splitlines() if options.runs else default_lines()
    folder = options.out.resolve()
    shared = [f"device={options.device}", f"runs={folder / 'runs'}", "wandb.mode=disabled"]
    for line in filter(None, map(str.strip, lines)):
        name, *words = shlex.split(line)
        if name not in SCRIPTS:
            raise UserError(f"{options.runs}: '{line}' should begin with {' or '.join(SCRIPTS)}")
        script = [SCRIPTS[name], *words, *options.set, *shared]
        yield line, partial(train, script, folder / "train.log")


def measure(run: Measurement, seconds: float) -> Values | None:
    """Carry out ``run``, which stops by itself after ``seconds``."""
    return run(seconds)


def train(script: Sequence[str], log: Path, seconds: float) -> Values | None:
    """Run a training script; None if it was stopped after ``seconds``, with its state saved."""
    with log.open("a") as file:
        begin = file.tell()
        process = start(script, file)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            return None
        except KeyboardInterrupt:
            stop(process)
            raise
    if status == 0:
        return {"state": "finished"}
    return {"error": error_of(log, begin, status)}


def error_of(log: Path, begin: int, status: int) -> str:
    """Return the last line that a run has written to ``log`` since the byte ``begin``.

    A run that a signal has killed has not written about it.
    """
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    return next(filter(str.strip, reversed(lines)), f"ended with status {status}")


def start(script: Sequence[str], output: IO[str]) -> subprocess.Popen[str]:
    """Start a script of the suite, which writes to ``output``."""
    words = [sys.executable, *script]
    return subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)


def stop(process: subprocess.Popen[str]) -> None:
    """Let a run save its state and end."""
    process.terminate()
    try:
        process.wait(SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def table(found: Mapping[str, Values], options: argparse.Namespace) -> list[str]:
    """Return the lines of the table: a row for each run."""
    states = {key: found.get(key, {}) for key, _ in measurements(options)}
    lines = [
        table_row([key, values.get("error") or values.get("state", "not finished")])
        for key, values in states.items()
    ]
    return [*table_head(("run", "state"), text_columns=2), *lines]
