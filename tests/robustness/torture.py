"""Jobs with every kind of fault at many moments: `make torture`.

Each test prints a row of the table in results/robustness.md: what it did, how often, what was lost.
test_faults.py has a few of these faults.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import Undisturbed, check_survives, kill_at_random, outcome
from faults import JOBS, Attempt
from stand_in import StandIn, reporting_run, wait_until

PAIRS = 5  # of a run that reports to W&B and one that does not
MAX_SLOWDOWN = 1.05
RANDOM_KILLS = 40  # of each job
MOMENTS = 8
WORKERS = 3


@pytest.fixture
def row(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Return a list for the cells of a table row, which is printed at the end of the test."""
    cells: list[str] = []
    started = time.monotonic()
    yield cells
    with capsys.disabled():
        print(f"\n| {' | '.join(cells)} | {time.monotonic() - started:.0f} s |")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("act", ["killed", "power failure", "disk full", "clock jumps"])
def test_faults_at_changes_of_files(
    undisturbed: Undisturbed, tmp_path: Path, job: str, act: str, row: list[str]
) -> None:
    """The moments are before and during a write, and before a sync, a rename or a removal."""
    last = undisturbed.moments(job)
    chosen = sorted({round(1 + (last - 1) * part / MOMENTS) for part in range(MOMENTS + 1)})
    for number in chosen:
        check_survives(undisturbed, job, act, number=number, folder=tmp_path / str(number))
    row += [job, f"{act} at {len(chosen)} of {last} file changes", f"{len(chosen)}", "nothing"]


@pytest.mark.parametrize("job", JOBS)
def test_kills_at_random_times(
    undisturbed: Undisturbed, tmp_path: Path, job: str, row: list[str]
) -> None:
    kills, runs = kill_at_random(undisturbed, job, RANDOM_KILLS, tmp_path)
    row += [job, "SIGKILL at random moments", f"{kills}, in {runs} runs", "nothing"]


def test_processes_that_share_all_jobs_and_are_killed(
    undisturbed: Undisturbed, tmp_path: Path, row: list[str]
) -> None:
    """They meet at jobs, teachers and shared phases; a killed process is started again."""
    chance, kills, rounds = random.Random(3), 0, 0
    while kills < RANDOM_KILLS:
        runs = tmp_path / str(rounds)
        kills += _share(runs, chance)
        rounds += 1
        found = outcome(runs)
        for job in JOBS:
            assert undisturbed.outcome(job).items() <= found.items()
    test = f"SIGKILL of {WORKERS} processes that share all jobs"
    row += [f"all {len(JOBS)}", test, f"{kills}, in {rounds} rounds", "nothing"]


def _share(runs: Path, chance: random.Random) -> int:
    """Run all jobs in each of the workers, in a random order; return the number of kills."""
    kills = 0
    todo = {worker: chance.sample(list(JOBS), len(JOBS)) for worker in range(WORKERS)}
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
            assert status in (0, 75, -9), attempt.output
            kills += status == -9
            if status == 0:
                todo[worker].pop(0)
            elif status == 75:  # another worker has it: try it later
                todo[worker].append(todo[worker].pop(0))
        time.sleep(0.02)
    return kills


@pytest.mark.parametrize("fault", ["none", "answers 500", "hangs", "closed"])
def test_wandb_does_not_slow_training(tmp_path: Path, fault: str, row: list[str]) -> None:
    """The server fails from the end of the first epoch; an epoch takes one or two seconds."""
    ratios = []
    for pair in range(PAIRS):
        modes = ["online", "disabled"] if pair % 2 else ["disabled", "online"]
        seconds = {mode: _seconds(tmp_path / f"{pair} {mode}", mode, fault) for mode in modes}
        ratios.append(seconds["online"] / seconds["disabled"])
    listed = ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios))
    measured = f"ratio of the time with W&B to the time without: {listed}"
    row += ["a run of resnet8", f"W&B: {fault}", f"{PAIRS} pairs", measured]
    assert statistics.median(ratios) <= MAX_SLOWDOWN, listed


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
