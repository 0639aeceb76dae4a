"""One process at a time in a run's folder, on whatever node it is.

Nothing here needs PyTorch, so that the report can ask who is at work.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from sskd.errors import BusyError, UserError
from sskd.output import say

_FILE = ".lease"
# Every process that looks at a folder must agree on it. A node that dies leaves its cells to
# others after this many seconds; a process that dies, to those on its node at once.
DURATION = 120.0
HEARTBEAT = 20.0
# A holder that has not been heard of for so long may be dead, and is worth watching.
_SUSPICIOUS_SILENCE = 3 * HEARTBEAT
_POLL = 0.5  # seconds between two looks of a process that waits


class FolderLock:
    """A lease on a folder: renewed while its holder lives, and free when it has died.

    It needs nothing of the file system but that a file is created once, so it holds on NFS too.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lease = _lease(folder)

    def acquire(self, *, wait: bool = False, watch: bool = True) -> None:
        """Take the folder.

        Args:
            wait: wait for another process that has it, instead of an error.
            watch: watch, for the time of a lease, a holder that has not been heard of and may
                have died with its node, instead of an error.

        Raises:
            BusyError: another process, on this node or another, is at work in it.
            UserError: what stands there is no lock of this version.
            OSError: the folder cannot be written.
        """
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            os.utime(self._folder)  # where nothing can be written a dead holder's lease stays
            self._acquire_from_another(wait, watch)
        except LeaseSettingsMismatch:
            raise UserError(
                f"{self._folder / _FILE}: is not a lock of this version; where nobody is at work "
                "there, remove it"
            ) from None

    def _acquire_from_another(self, wait: bool, watch: bool) -> None:
        if wait:
            say(f"{self._folder}: waiting for {_holder(self._folder)}")
            self._lease.acquire()
            return
        # A heartbeat in the future tells as little as an old one: a clock has jumped.
        silent = abs(_seconds_since_heartbeat(self._folder)) > _SUSPICIOUS_SILENCE
        told = _holder(self._folder)
        if silent and watch:
            say(f"{self._folder}: watching whether {told} has died")
        try:  # a holder on another node is dead only when it has been silent while one watched
            self._lease.acquire(timeout=DURATION + HEARTBEAT if silent and watch else 0)
        except Timeout:
            raise BusyError(f"{self._folder}: {told} is working on this run") from None

    def release(self) -> None:
        """Let go of the folder."""
        self._lease.release()

    @contextmanager
    def writing(self) -> Iterator[Callable[[], None]]:
        """Check that this process still holds the folder, before a write and within it.

        Yields ``check``, which a writer calls when its file is ready. If a file or the folder is
        gone, the check is repeated, since losing the folder is the better explanation.
        """
        self.check()
        try:
            yield self.check
        except FileNotFoundError:
            self.check()
            raise

    def check(self) -> None:
        """Ask, before anything is written into the folder, whether it is still this process's.

        Raises:
            BusyError: it has become another's, as after a long standstill.
            UserError: it was removed.
        """
        if not self._folder.is_dir():
            raise UserError(
                f"{self._folder}: was removed while this process was at work in it; the same "
                "command starts it afresh"
            )
        owner = self._lease.owner
        if owner and owner.token != self._lease.token:
            raise BusyError(
                f"{self._folder}: was lost to {_holder(self._folder)}, because this process stood "
                f"still for more than {DURATION:.0f} seconds"
            )
        if owner is None or self._lease.compromise is not None:
            raise BusyError(
                f"{self._folder / _FILE}: was removed, or could not be renewed for {DURATION:.0f} "
                "seconds, so that another process may work here"
            )


def is_held(folder: Path) -> bool:
    """Return whether a process that lives is at work in ``folder``."""
    owner = _lease(folder).owner
    if owner is None or _seconds_since_heartbeat(folder) > DURATION:
        return False
    return not (owner.hostname == _own_node() and _is_gone(owner.pid))


def remove_lock_file(folder: Path) -> None:
    """Remove what a lock has left in ``folder``, which was moved while its lock was held."""
    (folder / _FILE).unlink(missing_ok=True)


def _lease(folder: Path) -> SoftFileLease:
    return SoftFileLease(
        folder / _FILE,
        lease_duration=DURATION,
        heartbeat_interval=HEARTBEAT,
        poll_interval=_POLL,
    )


def _seconds_since_heartbeat(folder: Path) -> float:
    try:
        return time.time() - (folder / _FILE).stat().st_mtime
    except OSError:
        return 0.0


def _holder(folder: Path) -> str:
    owner = _lease(folder).owner
    if owner is None:
        return "another process"
    return f"another process ({owner.pid} on {owner.hostname.partition('?')[0]})"


@cache
def _own_node() -> str:
    """Return what a lease of this process tells of the node: its name, and a container's mark.

    A process number of another container is another process here, or none. Where that cannot be
    found out it is nobody's, and heartbeats alone tell.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, _lease(Path(folder)) as lease:
            owner = lease.owner
    except OSError:
        return ""
    assert owner is not None
    return owner.hostname


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
