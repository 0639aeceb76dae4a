"""Turns of jobs that share one process, each in a thread of its own.

Only the thread whose turn it is works. It passes the turn on between two training steps, and while
it waits for something outside of the process. So code that is not thread-safe needs no lock: a
trace of a network, a cache, the environment variables. What is global in a process, such as
PyTorch's random generators, belongs to the job whose turn it is, so a job's result does not depend
on its neighbours.

A thread must not wait for another one while it has the turn, and must not pass the turn on inside a
``with`` block that changes a global setting. Without other jobs in the process, all functions here
do nothing. Importing this takes no time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from sskd.errors import Interrupted

T = TypeVar("T")

# Seconds. To pass a turn takes some 20 microseconds, as long as the start of a step on a GPU.
_SHORTEST_TURN = 1e-3


class Globals(Protocol):
    """What is global in the process, and belongs to one job."""

    def save(self) -> None:
        """Keep the present values, at the end of a turn."""

    def restore(self) -> None:
        """Set the values that were kept, at the start of a turn."""


class Turns:
    """Hands the turn from thread to thread, to the one that has waited longest.

    Args:
        received: returns the signal that stops all jobs, or None.
    """

    def __init__(self, received: Callable[[], int | None]) -> None:
        self.received = received
        self.abandoned = False
        self.shared: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._is_taken = False

    @contextmanager
    def job(self, own: Globals) -> Iterator[None]:
        """Wait for a turn, take turns inside the ``with`` block, and give the turn back at its end.

        ``own`` saves and restores the global values of this job.
        """
        turn = _here.turn = _Turn(self, own)
        try:
            turn.begin()
            yield
        finally:
            _here.turn = None
            turn.end()

    def abandon(self) -> None:
        """Let each job raise KeyboardInterrupt at the start of its next turn."""
        self.abandoned = True

    def is_awaited(self) -> bool:
        """Return whether a thread waits for the turn."""
        return bool(self._waiting)

    def take(self) -> None:
        """Wait for the turn."""
        with self._mutex:
            if not self._is_taken:
                self._is_taken = True
                return
            mine = self._stand_in_line()
        mine.acquire()

    def pass_on(self) -> None:
        """End the turn, and wait for the next one behind all that wait now."""
        with self._mutex:
            mine = self._stand_in_line()
            self._waiting.popleft().release()
        mine.acquire()

    def _stand_in_line(self) -> threading.Lock:
        mine = threading.Lock()
        mine.acquire()
        self._waiting.append(mine)
        return mine

    def give(self) -> None:
        """End the turn."""
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_taken = False


class _Turn:
    """The turns of one thread."""

    def __init__(self, turns: Turns, own: Globals) -> None:
        self.turns = turns
        self._own = own
        self._since = 0.0
        self._has_turn = False
        self._was_abandoned = False

    def begin(self) -> None:
        self.turns.take()
        self._has_turn = True
        self._start()

    def _start(self) -> None:
        self._own.restore()
        self._since = time.monotonic()

    def end(self) -> None:
        if self._has_turn:
            self._has_turn = False
            try:
                self._own.save()
            finally:  # otherwise the other jobs would wait for ever
                self.turns.give()

    def pass_on(self, shortest: float) -> None:
        if self.turns.is_awaited() and time.monotonic() - self._since >= shortest:
            self._own.save()
            self.turns.pass_on()
            self._start()
        self.raise_if_abandoned()

    def raise_if_abandoned(self) -> None:
        if self.turns.abandoned and not self._was_abandoned:
            self._was_abandoned = True  # what closes the run then works as always
            raise KeyboardInterrupt


class _Here(threading.local):
    turn: _Turn | None = None


_here = _Here()


def shares_process() -> bool:
    """Return whether this thread is one of several jobs of the process."""
    return _here.turn is not None


def pass_turn(*, at_once: bool = False) -> None:
    """Let another job work, if one waits.

    Args:
        at_once: even if this job's turn has only begun.

    Raises:
        KeyboardInterrupt: the user does not want to wait for the jobs.
    """
    if _here.turn is not None:
        _here.turn.pass_on(0 if at_once else _SHORTEST_TURN)


@contextmanager
def outside_turn() -> Iterator[None]:
    """Let other jobs work inside the ``with`` block, which waits for something outside.

    Raises:
        KeyboardInterrupt: the user does not want to wait for the jobs.
    """
    turn = _here.turn
    if turn is None:
        yield
        return
    turn.end()
    try:
        yield
    finally:
        turn.begin()
    turn.raise_if_abandoned()


def received_signal() -> int | None:
    """Return the signal that stops all jobs of this process, if it has come."""
    return None if _here.turn is None else _here.turn.turns.received()


def must_stop() -> bool:
    """Return whether this job should stop waiting."""
    return _here.turn is not None and (_here.turn.turns.abandoned or received_signal() is not None)


def raise_if_stopped() -> None:
    """Raise Interrupted if a signal stops all jobs of this process."""
    if (signum := received_signal()) is not None:
        raise Interrupted(signum)


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """Return the object that ``make`` returns; jobs that need the same ``key`` share it.

    It lives as long as one of them refers to it.
    """
    if _here.turn is None:
        return make()
    known = _here.turn.turns.shared
    found: T | None = known.get(key)
    if found is None:
        found = known[key] = make()
    return found
