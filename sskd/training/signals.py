"""Signals that stop a run after its current step, with its state saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from sskd.errors import Interrupted, UserError
from sskd.turns import received_signal

# Schedulers send these before they end a job. They stop a run only if a handler is installed:
# submitit installs one that requeues the job and ends the process.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Records SIGTERM, SIGINT and a scheduler's warning inside a ``with`` block.

    A SIGINT after any earlier signal raises KeyboardInterrupt at once. In a thread of a launcher,
    the signals are those that the launcher has recorded.

    Attributes:
        noted: the signal that came to this block itself, if any.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def received(self) -> int | None:
        """The signal that has come, if any."""
        return received_signal() if self.noted is None else self.noted

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            handled = [signum for signum in _WARNINGS if callable(signal.getsignal(signum))]
            for signum in (signal.SIGTERM, signal.SIGINT, *handled):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def raise_if_received(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.noted is not None:
            raise KeyboardInterrupt
        self.noted = signum


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise Interrupted if SIGTERM comes outside of training, so that everything is closed.

    A launcher ends the processes that it started, a run closes its folder and its W&B run. A
    handler that is already installed, such as a scheduler's, stays.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def forward_scheduler_signal() -> Iterator[None]:
    """Forward the warning that stopped the run to the scheduler's handler, at the end.

    By then the run is saved and closed. The handler usually ends the process, and SLURM ends its
    children as soon as submitit has requeued the job. A thread of a launcher leaves it to the
    launcher, which waits for the other jobs.
    """
    try:
        yield
    except Interrupted as stop:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if stop.signum in _WARNINGS and in_main_thread:
            try:
                signal.raise_signal(stop.signum)
            except Exception as error:
                raise UserError(
                    f"{stop}; the run is saved, but the job could not be requeued ({error}); rerun "
                    "the same command to resume"
                ) from None
        raise
