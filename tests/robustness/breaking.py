"""What becomes of a cell that is broken, held against one that was left alone."""

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
    """Return all that must not depend on how often a run was stopped: weights, metrics, results."""
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
    """Each cell's outcome, moments and seconds, measured once for all processes with this root."""

    root: Path
    _known: dict[str, tuple[dict[str, Any], int, float]] = field(default_factory=dict)

    def _of(self, cell: str) -> tuple[dict[str, Any], int, float]:
        if cell not in self._known:
            runs, facts = self.root / cell, self.root / f"{cell}.json"
            with FileLock(self.root / f"{cell}.lock"):
                if not facts.exists():
                    shutil.rmtree(runs, ignore_errors=True)  # of a process that failed
                    forked(int).join()  # exclude the server's start, which takes seconds
                    started = time.monotonic()
                    attempt = Attempt(cell, runs, fault=Fault("undisturbed", 0, runs))
                    assert attempt.end(after=300) == 0, attempt.told
                    seconds = time.monotonic() - started
                    facts.write_text(json.dumps([attempt.moments, seconds]))
            self._known[cell] = (outcome(runs), *json.loads(facts.read_text()))
        return self._known[cell]

    def outcome(self, cell: str) -> dict[str, Any]:
        """Return all that a cell leaves, times aside."""
        return self._of(cell)[0]

    def moments(self, cell: str) -> int:
        """Return at how many moments a cell changes files."""
        return self._of(cell)[1]

    def seconds(self, cell: str) -> float:
        """Return how long a cell takes."""
        return self._of(cell)[2]


def broken(undisturbed: Undisturbed, cell: str, act: str, number: int, folder: Path) -> Path:
    """Break ``cell`` at its ``number``-th moment; return its folder of runs as that leaves it."""
    folder.mkdir()
    runs = folder / "runs"
    attempt = Attempt(cell, runs, fault=Fault(act, number, runs, seed=number))
    status = attempt.end(after=300)
    if act == "disk full":
        if status != 0:  # at the very end nothing more has to be written
            assert status == 1, attempt.told
            assert "No space left on device" in refused(attempt)
    else:
        assert status == (0 if act == "clock jumps" else -9), attempt.told
    return runs


def saved(runs: Path) -> dict[str, int]:
    """Return of how many epochs, all stages together, each run's newest whole checkpoint is."""
    found: dict[str, int] = {}
    for path in [*runs.rglob("last.pt"), *runs.rglob("previous.pt")]:
        with suppress(CorruptFileError):
            name = str(path.parent.relative_to(runs))
            found[name] = max(found.get(name, 0), load_checkpoint(path)["lines"])
    return found


def costs_an_epoch_at_most(cell: str, number: int, after_power: Path, folder: Path) -> None:
    """Hold what a power failure has left against what a kill at the same moment leaves."""
    folder.mkdir()
    killed = Attempt(cell, folder / "runs", fault=Fault("killed", number, folder / "runs"))
    assert killed.end(after=300) == -9, killed.told
    left = saved(after_power)
    for name, epochs in saved(folder / "runs").items():
        assert left.get(name, 0) >= epochs - 1, (name, epochs, left)


def refused(attempt: Attempt) -> str:
    """Return the one line with which a process gave up."""
    told = [line for line in attempt.told if line and not line.startswith("moments ")]
    assert not any("Traceback" in line for line in told), told
    (line,) = (line for line in told if line.startswith("error: "))
    return line


def ends_undisturbed(undisturbed: Undisturbed, cell: str, runs: Path) -> None:
    """Run ``cell`` to its end, and hold what it leaves against the undisturbed one, bit for bit."""
    attempt = Attempt(cell, runs)
    status = attempt.end(after=300)
    assert status == 0, (status, attempt.told)
    assert outcome(runs) == undisturbed.outcome(cell)
    # Who is killed when all is done, while telling so, leaves a little text behind.
    assert all(".status.json." in path.name for path in runs.rglob(".*.part"))


def survives(undisturbed: Undisturbed, cell: str, act: str, number: int, folder: Path) -> None:
    """Break ``cell`` at its ``number``-th moment, and see it go on to the end from what is left."""
    runs = broken(undisturbed, cell, act, number, folder)
    if act == "power failure":
        costs_an_epoch_at_most(cell, number, runs, folder / "killed")
    ends_undisturbed(undisturbed, cell, runs)


def killed_at_random(
    undisturbed: Undisturbed, cell: str, kills: int, folder: Path
) -> tuple[int, int]:
    """Kill ``cell`` at random moments, ``kills`` times at least, each time starting it again.

    A run that comes to its end is held against the undisturbed one, and another begins. Returns
    the kills and the runs.
    """
    chance, done, ends = random.Random(cell), 0, 0
    while done < kills:
        runs, status = folder / str(ends), -9
        while status == -9:
            attempt = Attempt(cell, runs)
            status = attempt.end(after=chance.uniform(0, undisturbed.seconds(cell)))
            done += status == -9
        assert status == 0, attempt.told
        assert outcome(runs) == undisturbed.outcome(cell)
        ends += 1
    return done, ends
