"""Jobs with faults at some moments; `make torture` tests many more (torture.py)."""

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
    check_finishes,
    check_survives,
    error_line,
    kill_at_random,
    outcome,
)
from faults import Attempt
from stand_in import wait_until

pytestmark = pytest.mark.usefixtures("undisturbed")


@pytest.mark.parametrize("act", ["killed", "power failure"])
@pytest.mark.parametrize("job", ["ft", "crd"])
def test_a_job_survives_a_fault_at_any_moment(
    undisturbed: Undisturbed, tmp_path: Path, job: str, act: str
) -> None:
    last = undisturbed.moments(job)
    for number in random.Random(f"{job} {act}").sample(range(1, last), 3):
        check_survives(undisturbed, job, act, number=number, folder=tmp_path / str(number))


def test_a_job_that_is_killed_repeatedly_finishes(undisturbed: Undisturbed, tmp_path: Path) -> None:
    kills, finished = kill_at_random(undisturbed, "kd", 4, tmp_path)
    assert kills >= 4
    assert finished


@pytest.mark.parametrize("job", ["ft"])
def test_a_full_disk_is_a_one_line_error_and_loses_nothing(
    undisturbed: Undisturbed, tmp_path: Path, job: str
) -> None:
    last = undisturbed.moments(job)
    for number in random.Random(2).sample(range(1, last), 3):
        check_survives(undisturbed, job, "disk full", number=number, folder=tmp_path / str(number))


def test_a_clock_that_jumps_changes_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    last = undisturbed.moments("kd")
    for number in (last // 3, last // 3 + 1):  # forward, and back
        check_survives(
            undisturbed, "kd", "clock jumps", number=number, folder=tmp_path / str(number)
        )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB; return its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64K", "tmpfs", str(disk))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield disk
    while disk.is_mount():  # a failed test can leave two mounts
        subprocess.run(["umount", "--lazy", disk], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def test_a_disk_that_fills_up(undisturbed: Undisturbed, small_disk: Path) -> None:
    runs, size, errors = small_disk / "runs", 64, 0
    while True:
        attempt = Attempt("alone", runs, log=small_disk.with_name("log"))
        if attempt.end(after=300) == 0:
            break
        assert "No space left on device" in error_line(attempt)
        errors, size = errors + 1, int(size * 1.4)
        mount("-o", f"remount,size={size}K", str(small_disk))
    assert errors > 5
    assert outcome(runs) == undisturbed.outcome("alone")


def test_a_disk_that_fills_up_with_files_of_wandb(
    undisturbed: Undisturbed, small_disk: Path
) -> None:
    """The process of W&B writes there too, and may die when the disk is full."""
    runs, size, status = small_disk / "runs", 64, 1
    while status:
        attempt = Attempt("alone", runs, "wandb.mode=offline", log=small_disk.with_name("log"))
        status = attempt.end(after=300)
        assert status in (0, 1), attempt.output
        assert not any("Traceback" in line for line in attempt.output), attempt.output
        size *= 2
        mount("-o", f"remount,size={size}K", str(small_disk))
    assert outcome(runs) == undisturbed.outcome("alone")


def test_a_disk_that_becomes_read_only(undisturbed: Undisturbed, small_disk: Path) -> None:
    disk, runs, log = str(small_disk), small_disk / "runs", small_disk.with_name("log")
    mount("-o", "remount,size=100M", disk)
    attempt = Attempt("alone", runs, log=log)
    wait_until(lambda: list(runs.rglob("last.pt")))
    mount("--bind", disk, disk)  # a second mount, because the open lease keeps the first writable
    mount("-o", "remount,bind,ro", disk)
    assert attempt.end(after=300) == 1
    assert "Read-only file system" in error_line(attempt)
    attempt = Attempt("alone", runs, log=log)
    assert attempt.end(after=300) == 1
    assert "cannot be written (Read-only file system); use another" in error_line(attempt)
    subprocess.run(["umount", "--lazy", disk], check=True)
    check_finishes(undisturbed, "alone", runs)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_ends_with_its_status(
    undisturbed: Undisturbed, tmp_path: Path, signum: int
) -> None:
    chance, stopped, runs = random.Random(int(signum)), 0, tmp_path / "runs"
    for _ in range(30):
        attempt = Attempt("alone", runs)
        time.sleep(chance.uniform(0.3, 1.5 * undisturbed.seconds("alone")))
        attempt.send(signum)
        status = attempt.end(after=300)
        # A process without its signal handlers yet ends by the signal itself.
        assert status in (0, 128 + signum, -signum), attempt.output
        assert not any("Traceback" in line for line in attempt.output)
        stopped += status == 128 + signum
        if status == 0 and stopped:
            break
        if status == 0:  # it finished before the signal
            shutil.rmtree(runs)
    assert stopped
    check_finishes(undisturbed, "alone", runs)


def test_a_run_whose_folder_was_removed_reports_it(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    attempt = Attempt("alone", runs, "schedule.epochs=1000")
    while not list(runs.rglob("last.pt")):
        time.sleep(0.05)
    (folder,) = {path.parent for path in runs.rglob("last.pt")}
    folder.rename(tmp_path / "elsewhere")
    assert attempt.end(after=300) == 1
    assert error_line(attempt) == (
        f"error: {folder}: was removed while this process was using it; rerun the same "
        "command to start from scratch"
    )
    assert not folder.exists()
    shutil.rmtree(tmp_path / "elsewhere")
