"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in ``path``'s place.

    After a crash at any moment ``path`` holds either its old content or all of the new. What a
    killed process leaves is found by ``leftovers``.

    Args:
        keep: where the old content goes; a crash in between leaves it there, and no ``path``.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with named(path):
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if keep is not None and path.exists():
                path.replace(keep)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # a disk that has become read-only; the error itself counts
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add ``line`` to ``path`` and wait until the disk has it; a crash may leave a part of it.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    with named(path), path.open("a") as stream:
        stream.write(f"{line}\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_at(path: Path, offset: int, data: bytes, *, sync: bool) -> None:
    """Write ``data`` into the file ``path``, which is there, at byte ``offset``.

    With ``sync``, wait until the disk has all that was written into it.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    with named(path), path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an error of the system tell ``path``: a full disk's, for one, names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path) -> None:
    """Make the folder ``path``, and those above it, so that a power failure does not undo it.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    if path.is_dir():
        return
    with named(path):
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names of the files in ``path``."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_plain_file(path: Path) -> bool:
    """Return whether ``path`` is a file, no link, and no pipe, which would wait for ever."""
    return path.is_file() and not path.is_symlink()


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files that processes killed in mid-write have left in ``folder``."""
    return list(folder.glob(".*.part"))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    write_whole(path, lambda stream: stream.write(text.encode()))
