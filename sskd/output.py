"""Writing to a terminal, a log or a pipe: all output of the suite passes through this module.

Names and messages can come from an untrusted file, so characters that control a terminal are
replaced, in the lines of other libraries too while a command runs. A run must not fail because
nobody reads its output, so a stream that fails is not written to again. Importing this takes no
time.
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from sskd.errors import mask_unprintable

# The codes of progress bars and coloured logs: colours, the cursor up, the start and end of a line.
_KEPT = re.compile(r"(\x1b\[[0-9;]{0,20}m|\x1b\[A|[\r\n\t])")
CLEAR_SCREEN = "\x1b[H\x1b[2J\x1b[3J"


class _Here(threading.local):
    prefix = ""


_here = _Here()


@contextmanager
def prefixed_lines(prefix: str) -> Iterator[None]:
    """Begin each line of this thread with ``prefix`` inside a ``with`` block."""
    _here.prefix = prefix
    try:
        yield
    finally:
        _here.prefix = ""


def say(text: str, *, clear_screen: bool = False) -> None:
    """Write lines to standard output; ``clear_screen`` clears the terminal first, if it is one."""
    clear = clear_screen and sys.stdout is not None and sys.stdout.isatty()
    _write(sys.stdout, CLEAR_SCREEN * clear + cleaned(text))


def complain(text: str) -> None:
    """Write lines, an error or a warning, to standard error."""
    _write(sys.stderr, cleaned(text))


@functools.cache
def complain_once(text: str) -> None:
    """Do what ``complain`` does, unless this process has done so with the same ``text``."""
    complain(text)


def cleaned(text: str) -> str:
    """Return ``text`` with a question mark for each control character except line ends.

    Each line begins with the prefix of this thread, if it has one.
    """
    return "\n".join(_here.prefix + mask_unprintable(line) for line in text.split("\n"))


def _write(stream: TextIO | None, text: str) -> None:
    if stream is not None:  # None: the stream was closed when Python started
        steady = stream if isinstance(stream, SteadyStream) else SteadyStream(stream)
        steady.write_raw(f"{text}\n")
        steady.flush()


class SteadyStream:
    """A text stream that does not raise: after the first failure nothing more is written.

    Attributes:
        lost: the first failure, if there was one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write the ``text`` of another library, with question marks for control characters."""
        self.write_raw(
            "".join(p if _KEPT.fullmatch(p) else mask_unprintable(p) for p in _KEPT.split(text))
        )
        return len(text)

    def write_raw(self, text: str) -> None:
        """Write ``text`` unchanged, unless the stream has failed."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:
                self._give_up(error)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write ``lines``, unless the stream has failed."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, unless the stream has failed."""
        if self.lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: OSError | ValueError) -> None:
        self.lost = error
        if self._stream in (sys.__stdout__, sys.__stderr__):
            # Otherwise Python fails when it flushes the buffer at its end, and other libraries and
            # processes that share the stream fail too.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def steady_output() -> Iterator[None]:
    """Let a command run to its end even if its standard streams fail.

    That includes the output of other libraries. A character that the terminal's encoding lacks is
    replaced.
    """
    if isinstance(sys.stdout, SteadyStream):  # the command of this job has done it
        yield
        return
    _open_closed_streams()
    before, raising = (sys.stdout, sys.stderr), logging.raiseExceptions
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = map(SteadyStream, before)
    logging.raiseExceptions = False
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (sys.stdout, sys.stderr), logging.raiseExceptions = before, raising


def reader_has_gone() -> bool:
    """Return whether the other end of standard output, a pipe, is closed."""
    return isinstance(getattr(sys.stdout, "lost", None), BrokenPipeError)


def output_status() -> int:
    """Return 1, with a line, if standard output could not be written (a full disk), else 0.

    For commands whose result is their output. A reader that closes the pipe has read enough.
    """
    lost = getattr(sys.stdout, "lost", None)
    if not isinstance(lost, OSError) or lost.errno in (errno.EPIPE, errno.EBADF):
        return 0
    complain(f"error: the output cannot be written ({lost.strerror})")
    return 1


def _open_closed_streams() -> None:
    """Open on the null device each standard stream that was closed at the start (``>&-``).

    Otherwise the next file that is opened, perhaps a checkpoint, becomes the standard output of
    every library and of every process that this one starts.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
