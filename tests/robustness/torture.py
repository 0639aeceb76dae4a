"""Cells broken at every moment, in every way: `make torture`; test_faults.py has a share.

Each test prints what it did, how often and what was lost, as a row of the table in results/.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import Undisturbed, killed_at_random, outcome, survives
from faults import CELLS, Attempt
from stand_in import StandIn, reporting_run, wait_until

PAIRS = 5  # of a run that reports to W&B and one that does not
SLOWDOWN = 1.05  # at most
RANDOM_KILLS = 40  # of each cell
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
        survives(undisturbed, cell, act, number, tmp_path / str(number))
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
    chance, kills, rounds = random.Random(3), 0, 0
    while kills < RANDOM_KILLS:
        runs = tmp_path / str(rounds)
        kills += _share(runs, chance)
        rounds += 1
        found = outcome(runs)
        for cell in CELLS:
            assert undisturbed.outcome(cell).items() <= found.items()
    told = f"SIGKILL of {WORKERS} processes that share them"
    tell += [f"all {len(CELLS)}", told, f"{kills} times, {rounds} times all", "nothing"]


def _share(runs: Path, chance: random.Random) -> int:
    """Let workers do all cells, each in an order of its own; return how often one was killed."""
    kills = 0
    todo = {worker: chance.sample(list(CELLS), len(CELLS)) for worker in range(WORKERS)}
    attempts: dict[int, Attempt] = {}
    ends: dict[int, float] = {}
    while any(todo.values()):
        for worker in (worker for worker in todo if todo[worker] and worker not in attempts):
            log = runs.with_name(f"worker {worker}.log")
            attempts[worker] = Attempt(todo[worker][0], runs, log=log)
            ends[worker] = time.monotonic() + chance.uniform(0.1, 4)
        for worker, attempt in list(attempts.items()):
            if attempt.is_alive() and time.monotonic() < ends[worker]:
                continue
            status = attempt.end(after=0)
            del attempts[worker]
            assert status in (0, 75, -9), attempt.told
            kills += status == -9
            if status == 0:
                todo[worker].pop(0)
            elif status == 75:  # another's: later
                todo[worker].append(todo[worker].pop(0))
        time.sleep(0.02)
    return kills


@pytest.mark.parametrize("fault", ["none", "answers 500", "hangs", "closed"])
def test_training_keeps_its_pace_whatever_wandb_does(
    tmp_path: Path, fault: str, tell: list[str]
) -> None:
    """The server fails after the first epoch, for good; an epoch takes one or two seconds."""
    ratios = []
    for pair in range(PAIRS):
        modes = ["online", "disabled"] if pair % 2 else ["disabled", "online"]
        seconds = {mode: _seconds(tmp_path / f"{pair} {mode}", mode, fault) for mode in modes}
        ratios.append(seconds["online"] / seconds["disabled"])
    told = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    tell += ["a run of resnet8", f"W&B: {fault}", f"{PAIRS} pairs, time by time without: {told}"]
    assert statistics.median(ratios) <= SLOWDOWN, told


def _seconds(runs: Path, mode: str, fault: str) -> float:
    """Return the seconds from the first epoch's end to the last one's."""
    epochs = 15
    more = ("dataset.fraction=1", f"schedule.epochs={epochs}", f"wandb.mode={mode}")
    with StandIn() as server:
        run = reporting_run(server.url, runs, *more)
        wait_until(lambda: _lines(runs), 120)
        started = time.monotonic()
        server.fault = fault
        if fault == "closed":
            server.close()
        wait_until(lambda: len(_lines(runs)) == epochs, 600)
        seconds = time.monotonic() - started
        assert run.wait(120) == 0
    return seconds


def _lines(runs: Path) -> list[str]:
    return [line for path in runs.rglob("metrics.jsonl") for line in path.open()]
