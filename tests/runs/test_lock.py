"""The lease on a run's folder: one holder at a time, and no dead one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import SoftFileLease

import sskd.runs.lock
from sskd.errors import BusyError, UserError
from sskd.runs.lock import FolderLock, is_held

HOLDS = """
import sys, time
from pathlib import Path
from sskd.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def move_to_another_node(folder: Path, age: float) -> str:
    """Make the lock of ``folder`` one of another node, renewed ``age`` seconds ago."""
    path = folder / ".lease"
    text = path.read_text()
    assert socket.gethostname() in text
    path.write_text(text.replace(socket.gethostname(), "elsewhere"))
    moment = time.time() - age
    os.utime(path, (moment, moment))
    return path.read_text()


def test_a_folder_has_one_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert is_held(tmp_path)
    with pytest.raises(BusyError, match=rf"another process \({holder.pid} on .*\) is working on"):
        FolderLock(tmp_path).acquire()


def test_the_lock_of_a_killed_holder_is_free_at_once(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_held(tmp_path)
    lock, started = FolderLock(tmp_path), time.monotonic()
    lock.acquire()
    assert time.monotonic() - started < 5
    lock.check()
    lock.release()
    assert not is_held(tmp_path)


def test_a_live_holder_on_another_node_keeps_the_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    move_to_another_node(tmp_path, age=1)
    started = time.monotonic()
    with pytest.raises(BusyError, match="on elsewhere"):
        FolderLock(tmp_path).acquire()
    assert time.monotonic() - started < 5
    assert is_held(tmp_path)


@pytest.mark.parametrize("age", [1000, -1000])  # in the future if the clocks differ
def test_the_lock_of_a_dead_node_is_free_after_the_lease(
    tmp_path: Path, holder: subprocess.Popen[str], age: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    text = move_to_another_node(tmp_path, age)
    (tmp_path / ".lease").write_text(text.replace("120.0", "2.0"))
    os.utime(tmp_path / ".lease", (time.time() - age,) * 2)
    monkeypatch.setattr(sskd.runs.lock, "DURATION", 2.0)
    monkeypatch.setattr(sskd.runs.lock, "HEARTBEAT", 0.5)
    assert is_held(tmp_path) == (age < 0)
    lock, started = FolderLock(tmp_path), time.monotonic()
    lock.acquire()
    assert time.monotonic() - started >= 2  # it watched the file, and did not trust the clocks
    lock.release()


def test_a_holder_notices_that_its_lock_was_removed(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lease").unlink()
    with pytest.raises(BusyError, match=r"\.lease: was removed, or could not be renewed"):
        lock.check()
    lock.release()


def test_a_lock_of_another_version_is_reported(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    text = (tmp_path / ".lease").read_text()
    lock.release()
    (tmp_path / ".lease").write_text(text.replace("120.0", "7.0"))
    with pytest.raises(UserError, match=r"\.lease: was not created by this version"):
        FolderLock(tmp_path).acquire()


def test_a_process_id_of_another_container_is_not_checked(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """The same number here can be another process, or no process."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_held(tmp_path)
    name = re.search(r"^host=(.*)$", (tmp_path / ".lease").read_text(), re.M)
    assert name is not None
    text = (tmp_path / ".lease").read_text()
    (tmp_path / ".lease").write_text(text.replace(name[1], f"{name[1]}?pidns-f0000001"))
    assert is_held(tmp_path)


def test_without_watch_a_silent_holder_keeps_the_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    move_to_another_node(tmp_path, age=100)
    started = time.monotonic()
    with pytest.raises(BusyError, match="on elsewhere"):
        FolderLock(tmp_path).acquire(watch=False)
    assert time.monotonic() - started < 5


def test_a_holder_notices_that_it_lost_the_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.check()
    SoftFileLease(tmp_path / ".lease", lease_duration=sskd.runs.lock.DURATION).force_break()
    other = FolderLock(tmp_path)
    other.acquire()
    with pytest.raises(BusyError, match="was taken by another process"):
        lock.check()
    lock.release()
    other.check()  # the release of a lost lock does not free it
    other.release()
