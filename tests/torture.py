"""Cells broken at every moment, in every way: `make torture`; tests/test_faults.py has a share.

Each test prints what it did, how often and what was lost, as a row of the table in results/.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import Undisturbed, broken, ends_undisturbed, killed_at_random
from faults import CELLS, Attempt
from test_run import outcome

RANDOM_KILLS = 40  # of each cell, 240 of all
MOMENTS = 8
WORKERS = 3


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Collect what was done; print it as a row at the end."""
    told: list[str] = []
    started = time.monotonic()
    yield told
    with capsys.disabled():
        print(f"\n| {' | '.join(told)} | {time.monotonic() - started:.0f} s |")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("act", ["killed", "power failure", "disk full", "clock jumps"])
def test_moments_at_which_files_change(
    undisturbed: Undisturbed, tmp_path: Path, cell: str, act: str, tell: list[str]
) -> None:
    """Before a file is made, in mid-write, before its sync, before and after the renames."""
    last = undisturbed.moments(cell)
    chosen = sorted({round(1 + (last - 1) * part / MOMENTS) for part in range(MOMENTS + 1)})
    for number in chosen:
        runs = broken(undisturbed, cell, act, number, tmp_path / str(number))
        ends_undisturbed(undisturbed, cell, runs)
    told = f"{act} at {len(chosen)} of its {last} changes of files"
    tell += [cell, told, f"{len(chosen)} times", "nothing"]


@pytest.mark.parametrize("cell", CELLS)
def test_random_kills(undisturbed: Undisturbed, tmp_path: Path, cell: str, tell: list[str]) -> None:
    kills, ends = killed_at_random(undisturbed, cell, RANDOM_KILLS, tmp_path)
    tell += [cell, "SIGKILL at random moments", f"{kills} times, {ends} runs", "nothing"]


def test_processes_that_share_all_cells_and_are_killed(
    undisturbed: Undisturbed, tmp_path: Path, tell: list[str]
) -> None:
    """They meet on cells, the teacher and the shared phases; a killed one is followed by a new."""
    chance, kills, busy, runs = random.Random(3), 0, 0, tmp_path / "runs"
    todo = {worker: chance.sample(list(CELLS), len(CELLS)) for worker in range(WORKERS)}
    attempts: dict[int, Attempt] = {}
    ends: dict[int, float] = {}
    while any(todo.values()):
        for worker, cells in todo.items():
            if worker not in attempts and cells:
                log = tmp_path / f"worker {worker}.log"
                attempts[worker] = Attempt(cells[0], runs, log=log)
                ends[worker] = time.monotonic() + chance.uniform(0.2, 8)
        for worker, attempt in list(attempts.items()):
            if attempt.is_alive() and time.monotonic() < ends[worker]:
                continue
            status = attempt.end(after=0)
            del attempts[worker]
            assert status in (0, 75, -9), attempt.told
            kills += status == -9
            busy += status == 75
            if status == 0:
                todo[worker].pop(0)
            elif status == 75:  # another's: later
                todo[worker].append(todo[worker].pop(0))
        time.sleep(0.02)
    found = outcome(runs)
    for cell in CELLS:
        assert undisturbed.outcome(cell).items() <= found.items()
    tell += ["all six", f"SIGKILL of {WORKERS} that share them", f"{kills} times", "nothing"]
