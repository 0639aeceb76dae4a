"""The process in which measurements are made, one after the other."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import sskd
from sskd.errors import one_line

SUITE = Path(sskd.__file__).parent
LONGEST_SECONDS = 200  # of a measurement: longer means that it hangs

Values = dict[str, Any]  # what a measurement returns
Measurement = Callable[..., Any]  # returns Values
# Raised by a connection whose other end is closed, by ``recv`` and by ``send``.
CLOSED = (EOFError, BrokenPipeError, ConnectionResetError)


class Worker:
    """A process that makes one measurement after the other.

    A new one takes its place if a measurement fails, since an error can leave a GPU's process
    unusable, or if another program has killed it.
    """

    def __init__(self) -> None:
        self._process: Any = None

    def measure(self, measurement: Measurement, seconds: float) -> Values | None:
        """Return what ``measurement`` returns, or an ``error`` if it fails or hangs.

        It hangs if it takes more than ``LONGEST_SECONDS``. None if it takes more than ``seconds``,
        if these are fewer.
        """
        if self._process is None or not self._process.is_alive():
            self._start()
        try:
            self._connection.send(measurement)
            if not self._connection.poll(min(seconds, LONGEST_SECONDS)):
                self.end()
                late = {"error": f"took more than {LONGEST_SECONDS} s"}
                return None if seconds < LONGEST_SECONDS else late
            values: Values = self._connection.recv()
        except CLOSED:
            self._process.join()
            values = {"error": f"the process ended with status {self._process.exitcode}"}
        if "error" in values:
            self.end()
        return values

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,))
        with _ignored_interrupts():
            self._process.start()
        other.close()

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Let a process that is started inside the ``with`` block ignore Ctrl-C.

    The terminal sends it to both processes, and the one that has started the other ends it.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection) -> None:
    """Make the measurements that arrive, until the other end of ``connection`` is closed."""
    with suppress(*CLOSED):
        while True:
            connection.send(_values_of(connection.recv()))


def _values_of(measurement: Measurement) -> Values:
    try:
        values: Values = measurement()
    except Exception as error:
        return {"error": describe(error)}
    return values


def describe(error: BaseException) -> str:
    """Return the type and message of ``error``, and the last line of the suite that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(SUITE)]
    place = f" ({Path(own[-1].filename).relative_to(SUITE)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {one_line(error)[-300:]}{place}"
