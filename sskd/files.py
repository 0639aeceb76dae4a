"""Files that are written atomically, and untrusted files that are read with a limit.

A process can stop at any moment, and another one can then take its run's folder. So each function
that writes takes ``still_ours``, which raises if the folder has another holder. It is called when
the write is prepared and nothing has changed yet. A new holder first removes prepared files and
writes ``metrics.jsonl`` as a new file, so a later write of the earlier holder has no effect.

``write_at`` has no such guard: a process that resumes a teacher's outputs fills the same file,
because a copy would take tens of GiB of the disk. A late write can change bytes there. It is
detected, not prevented: the file's SHA-256 is compared before the file is resumed or used.
"""

from __future__ import annotations

import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hydra.core.hydra_config import HydraConfig

from sskd.errors import UserError

StillOurs = Callable[[], object]

MOST_DEPTH = 64  # levels of folders below one that is walked: os.walk recurses


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    keep: Path | None = None,
    still_ours: StillOurs | None = None,
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it to ``path``.

    After a crash at any moment ``path`` has either its old content or all of the new.
    ``stale_temporaries`` finds the temporary file of a killed process.

    Args:
        keep: the new path of the old content; a crash in between leaves it there, and no ``path``.
        still_ours: raises if the folder has another holder.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    # A process on another node can have the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with path_in_errors(path):
            with temporary.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            if still_ours is not None:
                still_ours()
            if keep is not None and path.exists():
                with suppress(FileNotFoundError):  # an earlier holder has moved it there
                    path.replace(keep)
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        with suppress(OSError):  # on a disk that became read-only, the first error counts
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str, *, still_ours: StillOurs | None = None) -> None:
    """Append ``line`` to ``path`` and wait until it is on disk; a crash may leave a part of it.

    ``still_ours`` is as in ``write_atomically``.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    with path_in_errors(path), path.open("a") as stream:
        if still_ours is not None:
            still_ours()
        stream.write(f"{line}\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_at(
    path: Path, offset: int, data: bytes, *, sync: bool, still_ours: StillOurs | None = None
) -> None:
    """Write ``data`` into the existing file ``path`` at byte ``offset``.

    With ``sync``, wait until everything is on disk. ``still_ours`` is as in ``write_atomically``.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    with path_in_errors(path), path.open("r+b") as stream:
        if still_ours is not None:
            still_ours()
        stream.seek(offset)
        stream.write(data)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add ``path`` to a system error; the error of a full disk, for example, names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_durable_folder(path: Path) -> None:
    """Create the folder ``path`` and its parents, so that a power failure does not undo it.

    Raises:
        OSError: with ``path`` as its ``filename``.
    """
    if path.is_dir():
        return
    with path_in_errors(path):
        make_durable_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Wait until the names of the files in ``path`` are on disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_regular_file(path: Path) -> bool:
    """Return whether ``path`` is a file, not a link, and not a pipe, which would block a reader."""
    return path.is_file() and not path.is_symlink()


def is_too_deep(folder: str, top: Path) -> bool:
    """Return whether ``folder`` is more than ``MOST_DEPTH`` levels below ``top``."""
    return folder.count(os.sep) - str(top).count(os.sep) > MOST_DEPTH


def stale_temporaries(folder: Path) -> list[Path]:
    """Return the temporary files in ``folder`` of processes that were killed during a write."""
    return list(folder.glob(".*.part"))


def write_text(path: Path, text: str, *, still_ours: StillOurs | None = None) -> None:
    """Write ``text`` to ``path`` atomically."""
    write_atomically(path, lambda stream: stream.write(text.encode()), still_ours=still_ours)


@contextmanager
def open_bounded(
    path: Path, most: int, *, follow: bool = False
) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open the untrusted file ``path``; yield it and its status.

    A file can grow while it is read: read no more than the ``st_size`` of its status.

    Args:
        most: the limit in bytes; a larger file could exhaust the memory.
        follow: follow a symbolic link.

    Raises:
        OSError: it cannot be opened, or is a link and ``follow`` is false.
        ValueError: it is not a regular file, or has more than ``most`` bytes.
    """
    # A pipe would block until a writer opens it, a link could point anywhere.
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    with os.fdopen(os.open(path, flags), "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > most:
            raise ValueError(f"it has more than {most} bytes, the limit for such a file")
        yield stream, status


def read_bounded(path: Path, most: int, *, follow: bool = False) -> bytes:
    """Return the content of the file ``path``; arguments and errors are as in ``open_bounded``."""
    with open_bounded(path, most, follow=follow) as (stream, status):
        return stream.read(status.st_size)


def read_lines(path: Path, most: int, most_lines: int) -> Iterator[bytes]:
    """Yield the lines of the untrusted file ``path``, with their ends.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a regular file, or has more than ``most`` bytes or ``most_lines``
            lines.
    """
    # One by one, because a list of empty lines would take forty times the size of the file.
    for number, line in enumerate(io.BytesIO(read_bounded(path, most))):
        if number == most_lines:
            raise ValueError(f"it has more than {most_lines} lines, the limit for such a file")
        yield line


def read_bounded_text(path: Path, most: int) -> str:
    """Return the content of ``path`` as text; ValueError if it is not UTF-8."""
    return read_bounded(path, most).decode()


def safe_join(folder: Path, *parts: str, setting: str = "runs") -> Path:
    """Return the path ``parts`` below ``folder``, which itself may be a link.

    ``setting`` is the one that chooses the place; the message names it.

    Raises:
        UserError: one of ``parts`` is a symbolic link, which may point outside.
    """
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise UserError(
                f"{path}: is a symbolic link, which may point outside of {folder}; put the "
                f"folder itself there, or name its place with {setting}=FOLDER"
            )
    return path


def expanded(path: str | Path) -> Path:
    """Return ``path`` with a leading ``~`` expanded to the home folder.

    A relative path is relative to the folder in which the command was started. It becomes absolute
    if Hydra has changed to another folder for the job (``hydra.job.chdir``).
    """
    try:
        return _start_of_command() / Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(f"{path}: {user} has no home folder; use an absolute path") from None


def cache_folder() -> Path | None:
    """Return the folder of the suite's caches of this user; None if the user has no home."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (configured if configured.is_absolute() else expanded("~/.cache")) / "sskd"
    except UserError:
        return None


def _start_of_command() -> Path:
    """Return the folder in which the command was started; empty if it is the current one."""
    if not HydraConfig.initialized():
        return Path()
    start = Path(HydraConfig.get().runtime.cwd)
    return Path() if start == Path.cwd() else start
