"""A small share of what `make torture` does (torture.py): cells broken on purpose."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from breaking import (
    Undisturbed,
    ends_undisturbed,
    killed_at_random,
    outcome,
    refused,
    survives,
)
from faults import Attempt
from stand_in import wait_until

pytestmark = pytest.mark.usefixtures("undisturbed")


@pytest.mark.parametrize("act", ["killed", "power failure"])
@pytest.mark.parametrize("cell", ["sskd", "crd"])
def test_a_cell_that_is_broken_anywhere_ends_like_an_undisturbed_one(
    undisturbed: Undisturbed, tmp_path: Path, cell: str, act: str
) -> None:
    last = undisturbed.moments(cell)
    for number in random.Random(f"{cell} {act}").sample(range(1, last), 5):
        survives(undisturbed, cell, act, number, tmp_path / str(number))


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
        survives(undisturbed, cell, "disk full", number, tmp_path / str(number))


def test_a_clock_that_jumps_changes_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    last = undisturbed.moments("kd")
    for number in (last // 3, last // 3 + 1):  # on, and back
        survives(undisturbed, "kd", "clock jumps", number, tmp_path / str(number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64K", "tmpfs", str(disk))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield disk
    while disk.is_mount():  # a test that failed may have left one over the other
        subprocess.run(["umount", "--lazy", disk], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def test_a_small_disk_that_is_full(undisturbed: Undisturbed, small_disk: Path) -> None:
    runs, size, refusals = small_disk / "runs", 64, 0
    while True:
        attempt = Attempt("alone", runs, log=small_disk.with_name("log"))
        if attempt.end(after=60) == 0:
            break
        assert "No space left on device" in refused(attempt)
        refusals, size = refusals + 1, int(size * 1.4)
        mount("-o", f"remount,size={size}K", str(small_disk))
    assert refusals > 5
    assert outcome(runs) == undisturbed.outcome("alone")


def test_a_small_disk_that_is_full_of_wandbs_files(
    undisturbed: Undisturbed, small_disk: Path
) -> None:
    """W&B's own process writes there too, and may die of it."""
    runs, size, status = small_disk / "runs", 64, 1
    while status:
        attempt = Attempt("alone", runs, "wandb.mode=offline", log=small_disk.with_name("log"))
        status = attempt.end(after=120)
        assert status in (0, 1), attempt.told
        assert not any("Traceback" in line for line in attempt.told), attempt.told
        size *= 2
        mount("-o", f"remount,size={size}K", str(small_disk))
    assert outcome(runs) == undisturbed.outcome("alone")


def test_a_disk_that_becomes_read_only(undisturbed: Undisturbed, small_disk: Path) -> None:
    disk, runs, log = str(small_disk), small_disk / "runs", small_disk.with_name("log")
    mount("-o", "remount,size=100M", disk)
    attempt = Attempt("alone", runs, log=log)
    wait_until(lambda: list(runs.rglob("last.pt")))
    mount("--bind", disk, disk)  # over the one where the lease is open, which would refuse
    mount("-o", "remount,bind,ro", disk)
    assert attempt.end(after=60) == 1
    assert "Read-only file system" in refused(attempt)
    attempt = Attempt("alone", runs, log=log)
    assert attempt.end(after=60) == 1
    assert "cannot be written (Read-only file system); choose another" in refused(attempt)
    subprocess.run(["umount", "--lazy", disk], check=True)
    ends_undisturbed(undisturbed, "alone", runs)


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
        # A process that has not begun yet ends by the signal itself.
        assert status in (0, 128 + signum, -signum), attempt.told
        assert not any("Traceback" in line for line in attempt.told)
        stopped += status == 128 + signum
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
        f"error: {folder}: was removed while this process was using it; rerun the same "
        "command to start from scratch"
    )
    assert not folder.exists()
    shutil.rmtree(tmp_path / "elsewhere")
