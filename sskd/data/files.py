"""Opening a stranger's file: a regular one, and no more of it than a bound."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def regular_file(path: Path, most: int) -> Iterator[tuple[io.BufferedReader, os.stat_result]]:
    """Open the file at ``path``; yield it with its status from before any of it is read.

    Args:
        most: bytes; a larger file could fill the memory.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is larger, or it is a pipe or a device.
    """
    with open(path, "rb", opener=_open_at_once) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        if status.st_size > most:
            raise ValueError(f"it has {status.st_size:,} bytes, and the limit is {most:,}")
        yield stream, status


def read_regular(path: Path, most: int) -> bytes:
    """Return the content of the file at ``path``; errors are as in ``regular_file``."""
    with regular_file(path, most) as (stream, _):
        return stream.read()


def _open_at_once(path: str, flags: int) -> int:
    # Opening a pipe would wait for a process that writes to it.
    return os.open(path, flags | os.O_NONBLOCK)
