"""Comparing a job that had a fault with an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import Attempt, Fault
from filelock import FileLock
from starting import forked

from sskd.errors import CorruptFileError
from sskd.runs.checkpoint_file import load_checkpoint

TIMES = {"seconds", "images_per_second", "date", "peak_memory_mib"}


def outcome(runs: Path) -> dict[str, Any]:
    """Return what must not depend on faults: weights, metrics and results, without times."""
    found: dict[str, Any] = {}
    for path in sorted(runs.rglob("*")):
        name = str(path.relative_to(runs))
        if path.name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.open()]
        elif path.name == "result.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name in ("model.safetensors", "best.pt", "views.png", "outputs.bin"):
            found[name] = path.read_bytes()
    return found


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in TIMES}


@dataclass
class Undisturbed:
    """The outcome, moments and seconds of each job, measured once for all users of ``root``."""

    root: Path
    _known: dict[str, tuple[dict[str, Any], int, float]] = field(default_factory=dict)

    def _of(self, job: str) -> tuple[dict[str, Any], int, float]:
        if job not in self._known:
            runs, facts = self.root / job, self.root / f"{job}.json"
            with FileLock(self.root / f"{job}.lock"):
                if not facts.exists():
                    shutil.rmtree(runs, ignore_errors=True)  # left by a process that failed
                    forked(int).join()  # exclude the server's start, which takes seconds
                    started = time.monotonic()
                    attempt = Attempt(job, runs, fault=Fault("undisturbed", 0, runs))
                    assert attempt.end(after=300) == 0, attempt.output
                    seconds = time.monotonic() - started
                    facts.write_text(json.dumps([attempt.moments, seconds]))
            self._known[job] = (outcome(runs), *json.loads(facts.read_text()))
        return self._known[job]

    def outcome(self, job: str) -> dict[str, Any]:
        """Return the outcome of ``job``."""
        return self._of(job)[0]

    def moments(self, job: str) -> int:
        """Return the number of moments at which ``job`` changes files."""
        return self._of(job)[1]

    def seconds(self, job: str) -> float:
        """Return how many seconds ``job`` takes."""
        return self._of(job)[2]


def break_job(undisturbed: Undisturbed, job: str, act: str, *, number: int, folder: Path) -> Path:
    """Cause a fault at the ``number``-th moment of ``job``; return its folder of runs."""
    folder.mkdir()
    runs = folder / "runs"
    attempt = Attempt(job, runs, fault=Fault(act, number, runs, seed=number))
    status = attempt.end(after=300)
    if act == "disk full":
        if status != 0:  # after the last write, a full disk is no error
            assert status == 1, attempt.output
            assert "No space left on device" in error_line(attempt)
    else:
        assert status == (0 if act == "clock jumps" else -9), attempt.output
    return runs


def saved_epochs(runs: Path) -> dict[str, int]:
    """Return the epochs of all phases in the newest intact checkpoint of each run."""
    found: dict[str, int] = {}
    for path in [*runs.rglob("last.pt"), *runs.rglob("previous.pt")]:
        with suppress(CorruptFileError):
            name = str(path.parent.relative_to(runs))
            found[name] = max(found.get(name, 0), load_checkpoint(path)["lines"])
    return found


def check_costs_at_most_an_epoch(
    job: str, number: int, after_power_failure: Path, folder: Path
) -> None:
    """Compare the checkpoints after a power failure with those after a kill at the same moment."""
    folder.mkdir()
    killed = Attempt(job, folder / "runs", fault=Fault("killed", number, folder / "runs"))
    assert killed.end(after=300) == -9, killed.output
    left = saved_epochs(after_power_failure)
    # A student's run counts those of its first phase, which are also in a folder of their own.
    shared = sum(epochs for name, epochs in left.items() if "/phases/" in name)
    for name, epochs in saved_epochs(folder / "runs").items():
        kept = left.get(name, shared if "/distill/" in name else 0)
        assert kept >= epochs - 1, (name, epochs, left)


def error_line(attempt: Attempt) -> str:
    """Return the only error line of a process that failed."""
    output = attempt.output
    assert not any("Traceback" in line for line in output), output
    (line,) = (line for line in output if line.startswith("error: "))
    return line


def check_finishes(undisturbed: Undisturbed, job: str, runs: Path) -> None:
    """Resume ``job`` and compare its outcome with the undisturbed one, bit for bit."""
    attempt = Attempt(job, runs)
    status = attempt.end(after=300)
    assert status == 0, (status, attempt.output)
    assert outcome(runs) == undisturbed.outcome(job)
    # A kill during the last write of a finished job leaves a temporary status.
    assert all(".status.json." in path.name for path in runs.rglob(".*.part"))


def check_survives(
    undisturbed: Undisturbed, job: str, act: str, *, number: int, folder: Path
) -> None:
    """Cause a fault at the ``number``-th moment of ``job``, and check that it then finishes."""
    runs = break_job(undisturbed, job, act, number=number, folder=folder)
    if act == "power failure":
        check_costs_at_most_an_epoch(job, number, runs, folder / "killed")
    check_finishes(undisturbed, job, runs)


def kill_at_random(undisturbed: Undisturbed, job: str, kills: int, folder: Path) -> tuple[int, int]:
    """Kill ``job`` at random times, at least ``kills`` times, and restart it each time.

    A run that finishes is compared with the undisturbed one, and another starts. Returns the
    numbers of kills and of finished runs.
    """
    chance, done, finished = random.Random(job), 0, 0
    while done < kills:
        runs, status = folder / str(finished), -9
        while status == -9:
            attempt = Attempt(job, runs)
            status = attempt.end(after=chance.uniform(0, undisturbed.seconds(job)))
            done += status == -9
        assert status == 0, attempt.output
        assert outcome(runs) == undisturbed.outcome(job)
        finished += 1
    return done, finished
