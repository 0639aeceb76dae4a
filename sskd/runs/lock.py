"""A lock that lets one process at a time, on any node, work in a run's folder.

Nothing here needs PyTorch, so that the report can ask which folders are locked.
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
from sskd.turns import must_stop, outside_turn, raise_if_stopped, shares_process

_FILE = ".lease"
# Seconds, the same in every process that uses a folder. If a node dies, others may take its folders
# after this time; if a process dies, those on its node may do so at once.
DURATION = 120.0
HEARTBEAT = 20.0
# A holder that has been silent for longer may be dead.
_SUSPICIOUS_SILENCE = 3 * HEARTBEAT
_POLL = 0.5  # seconds between two attempts of a process that waits


class FolderLock:
    """A lease on a folder, which its holder renews until it releases the lease or dies.

    It needs a file system that creates a file exclusively, as NFS does.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lease = _lease(folder)

    def acquire(self, *, wait: bool = False, watch: bool = True) -> None:
        """Lock the folder.

        Args:
            wait: wait until another process has released it, instead of an error.
            watch: if the holder is silent and may have died with its node, wait for the duration
                of a lease, instead of an error.

        Raises:
            BusyError: another process, on any node, holds the lock.
            UserError: the lock file was not created by this version.
            OSError: the folder cannot be written.
        """
        try:
            self._lease.acquire(timeout=0)
        except Timeout:
            # OSError if the folder is read-only: no lease can be broken there.
            os.utime(self._folder)
            self._acquire_from_another(wait, watch)
        except LeaseSettingsMismatch:
            raise UserError(
                f"{self._folder / _FILE}: was not created by this version; delete it if no process "
                "is using the folder"
            ) from None

    def _acquire_from_another(self, wait: bool, watch: bool) -> None:
        if wait:
            say(f"{self._folder}: waiting for {_holder(self._folder)}")
            self._wait(timeout=-1)
            return
        # A future timestamp is as unreliable as a stale one: a clock has jumped.
        silent = abs(_seconds_since_heartbeat(self._folder)) > _SUSPICIOUS_SILENCE
        holder = _holder(self._folder)
        if silent and watch:
            say(f"{self._folder}: waiting to see whether {holder} has died")
        try:  # a silent holder on another node counts as dead only after a whole lease
            self._wait(timeout=DURATION + HEARTBEAT if silent and watch else 0)
        except Timeout:
            raise BusyError(
                f"{self._folder}: {holder} is working on this run; rerun the same command after it "
                "has ended"
            ) from None

    def _wait(self, timeout: float) -> None:
        """Acquire the lease; other jobs of this process work in the meantime."""
        try:
            with outside_turn():
                self._lease.acquire(timeout=timeout, cancel_check=must_stop)
        except Timeout:
            raise_if_stopped()
            raise
        except BaseException:  # perhaps at the start of the turn after the wait
            self._lease.release()
            raise

    def release(self) -> None:
        """Release the folder."""
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
        """Check, before a write, that this process still holds the folder.

        Raises:
            BusyError: another process has taken it, for example after a long suspension.
            UserError: the folder was removed.
        """
        if not self._folder.is_dir():
            raise UserError(
                f"{self._folder}: was removed while this process was using it; rerun the same "
                "command to start from scratch"
            )
        owner = self._lease.owner
        if owner and owner.token != self._lease.token:
            raise BusyError(
                f"{self._folder}: was taken by {_holder(self._folder)}, because this process was "
                f"suspended for more than {DURATION:.0f} seconds; rerun the same command after "
                "that process has ended"
            )
        if owner is None or self._lease.compromise is not None:
            raise BusyError(
                f"{self._folder / _FILE}: was removed, or could not be renewed for {DURATION:.0f} "
                "seconds, so another process may have taken the folder; rerun the same command"
            )


def is_held(folder: Path) -> bool:
    """Return whether a living process holds ``folder``."""
    owner = _lease(folder).owner
    if owner is None or _seconds_since_heartbeat(folder) > DURATION:
        return False
    return not (owner.hostname == _own_node() and _is_gone(owner.pid))


def remove_lock_file(folder: Path) -> None:
    """Remove the lock file of ``folder``, which was moved while its lock was held."""
    (folder / _FILE).unlink(missing_ok=True)


def _lease(folder: Path) -> SoftFileLease:
    return SoftFileLease(
        folder / _FILE,
        lease_duration=DURATION,
        heartbeat_interval=HEARTBEAT,
        poll_interval=_POLL,
        thread_local=False,  # a thread that writes checks it too
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
    if shares_process() and owner.pid == os.getpid() and owner.hostname == _own_node():
        return "another job of this process"
    return f"another process ({owner.pid} on {owner.hostname.partition('?')[0]})"


@cache
def _own_node() -> str:
    """Return the host name that a lease of this process records, with a mark of its container.

    Process numbers are comparable only within a container. If the name cannot be determined, it is
    empty, and only heartbeats decide whether a holder lives.
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
    except PermissionError:  # it belongs to another user
        pass
    return False
