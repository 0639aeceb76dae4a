"""The lease on a run's folder: one holder, and none that is dead."""

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


def from_another_node(folder: Path, heard_of: float) -> str:
    """Make the lock of ``folder`` look like one of another node, ``heard_of`` seconds ago."""
    path = folder / ".lease"
    text = path.read_text()
    assert socket.gethostname() in text
    path.write_text(text.replace(socket.gethostname(), "elsewhere"))
    moment = time.time() - heard_of
    os.utime(path, (moment, moment))
    return path.read_text()


def test_a_folder_has_one_holder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert is_held(tmp_path)
    with pytest.raises(BusyError, match=rf"another process \({holder.pid} on .*\) is working on"):
        FolderLock(tmp_path).acquire()


def test_a_holder_that_was_killed_is_followed_at_once(
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


def test_a_holder_on_another_node_is_left_alone_while_it_is_heard_of(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    from_another_node(tmp_path, heard_of=1)
    started = time.monotonic()
    with pytest.raises(BusyError, match="on elsewhere"):
        FolderLock(tmp_path).acquire()
    assert time.monotonic() - started < 5
    assert is_held(tmp_path)


@pytest.mark.parametrize("heard_of", [1000, -1000])  # where clocks differ, in the future
def test_a_node_that_died_is_followed_after_the_lease(
    tmp_path: Path, holder: subprocess.Popen[str], heard_of: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    text = from_another_node(tmp_path, heard_of)
    (tmp_path / ".lease").write_text(text.replace("120.0", "2.0"))
    os.utime(tmp_path / ".lease", (time.time() - heard_of,) * 2)
    monkeypatch.setattr(sskd.runs.lock, "DURATION", 2.0)
    monkeypatch.setattr(sskd.runs.lock, "HEARTBEAT", 0.5)
    assert is_held(tmp_path) == (heard_of < 0)
    lock, started = FolderLock(tmp_path), time.monotonic()
    lock.acquire()
    assert time.monotonic() - started >= 2  # a clock says nothing; it was watched
    lock.release()


def test_a_holder_whose_lock_was_removed_knows(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    (tmp_path / ".lease").unlink()
    with pytest.raises(BusyError, match=r"\.lease: was removed, or could not be renewed"):
        lock.check()
    lock.release()


def test_what_is_no_lock_of_this_version_is_told(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    text = (tmp_path / ".lease").read_text()
    lock.release()
    (tmp_path / ".lease").write_text(text.replace("120.0", "7.0"))
    with pytest.raises(UserError, match=r"\.lease: was not created by this version"):
        FolderLock(tmp_path).acquire()


def test_a_process_of_another_container_is_not_looked_for_here(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """Its number is another process's here, or none's."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_held(tmp_path)
    name = re.search(r"^host=(.*)$", (tmp_path / ".lease").read_text(), re.M)
    assert name is not None
    text = (tmp_path / ".lease").read_text()
    (tmp_path / ".lease").write_text(text.replace(name[1], f"{name[1]}?pidns-f0000001"))
    assert is_held(tmp_path)


def test_a_silent_holder_is_not_watched_where_others_would_wait_for_it(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGSTOP)
    from_another_node(tmp_path, heard_of=100)
    started = time.monotonic()
    with pytest.raises(BusyError, match="on elsewhere"):
        FolderLock(tmp_path).acquire(watch=False)
    assert time.monotonic() - started < 5


def test_a_holder_that_lost_its_folder_knows(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.check()
    SoftFileLease(tmp_path / ".lease", lease_duration=sskd.runs.lock.DURATION).force_break()
    other = FolderLock(tmp_path)
    other.acquire()
    with pytest.raises(BusyError, match="was taken by another process"):
        lock.check()
    lock.release()
    other.check()  # what was lost is not released
    other.release()
