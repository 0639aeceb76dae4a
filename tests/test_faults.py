"""A small share of what `make torture` does (tests/torture.py): cells broken on purpose."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from breaking import Undisturbed, broken, ends_undisturbed, killed_at_random, refused
from faults import Attempt

pytestmark = pytest.mark.usefixtures("undisturbed")


@pytest.mark.parametrize("act", ["killed", "power failure"])
@pytest.mark.parametrize("cell", ["sskd", "crd"])
def test_a_cell_that_is_broken_anywhere_ends_like_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, cell: str, act: str
) -> None:
    last = undisturbed.moments(cell)
    for number in random.Random(f"{cell} {act}").sample(range(1, last), 5):
        runs = broken(undisturbed, cell, act, number, tmp_path / str(number))
        ends_undisturbed(undisturbed, cell, runs)


def test_a_cell_that_is_killed_again_and_again_comes_to_its_end(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    kills, ends = killed_at_random(undisturbed, "kd", 6, tmp_path)
    assert kills >= 6
    assert ends


@pytest.mark.parametrize("cell", ["ft"])
def test_a_full_disk_is_one_line_and_costs_nothing(
    undisturbed: Undisturbed, tmp_path: Path, cell: str
) -> None:
    last = undisturbed.moments(cell)
    for number in random.Random(2).sample(range(1, last), 5):
        runs = broken(undisturbed, cell, "disk full", number, tmp_path / str(number))
        ends_undisturbed(undisturbed, cell, runs)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_ends_with_its_status(
    undisturbed: Undisturbed, tmp_path: Path, signum: int
) -> None:
    chance, stopped, runs = random.Random(int(signum)), 0, tmp_path / "runs"
    for _ in range(30):
        attempt = Attempt("alone", runs)
        time.sleep(chance.uniform(0.3, 1.5 * undisturbed.seconds("alone")))
        attempt.send(signum)
        status = attempt.end(after=60)
        assert status in (0, 128 + signum), attempt.told
        assert not any("Traceback" in line for line in attempt.told)
        stopped += status != 0
        if status == 0 and stopped:
            break
        if status == 0:  # it had ended before the signal came
            shutil.rmtree(runs)
    assert stopped
    ends_undisturbed(undisturbed, "alone", runs)


def test_a_folder_that_is_removed_under_its_run_is_told(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    attempt = Attempt("alone", runs, "schedule.epochs=1000")
    while not list(runs.rglob("last.pt")):
        time.sleep(0.05)
    (folder,) = {path.parent for path in runs.rglob("last.pt")}
    folder.rename(tmp_path / "elsewhere")
    assert attempt.end(after=60) == 1
    assert refused(attempt) == (
        f"error: {folder}: was removed while this process was at work in it; the same command "
        "starts it afresh"
    )
    assert not folder.exists()
    shutil.rmtree(tmp_path / "elsewhere")
