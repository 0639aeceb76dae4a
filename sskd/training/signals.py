"""Stopping in good order: a signal lets the running step finish and its state be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from sskd.errors import Interrupted, UserError

# What schedulers warn with before they end a job. They mean a run only where somebody handles
# them: submitit puts a handler on one of the two that requeues the job and ends the process.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """While entered, SIGTERM, SIGINT and a scheduler's warning are noted.

    The second SIGINT interrupts at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

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
        if signum == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signum


@contextmanager
def raise_on_sigterm() -> Iterator[None]:
    """Raise Interrupted where SIGTERM comes outside of training, so that all is ended in order.

    A launcher ends the processes that it has begun, a run closes its folder and its W&B run. A
    handler that is there already, as a scheduler's, stays.
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
    """Pass a warning that has stopped the run on to the scheduler's handler, at the end.

    By then the run is saved and closed. The handler ends the process as a rule, and SLURM its
    children, as soon as submitit has asked it for the job to come back.
    """
    try:
        yield
    except Interrupted as stop:
        if stop.signum in _WARNINGS:
            try:
                signal.raise_signal(stop.signum)
            except Exception as error:
                raise UserError(f"{stop}, and saved, but does not come back: {error}") from None
        raise
