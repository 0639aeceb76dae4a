"""What stands in the folder of a run that is not open here, and how it makes way for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from sskd.errors import UserError
from sskd.files import fsync_folder, make_durable_folder
from sskd.runs.lock import FolderLock, remove_lock_file
from sskd.runs.names import CONFIG, LAST, MOST_CONFIG, MOST_RESULT, PREVIOUS, RESULT
from sskd.runs.result import Result
from sskd.runs.status import current_sweep, forced_in, read_status, write_status
from sskd.runs.untrusted import read_json, read_yaml

R = TypeVar("R", bound=Result)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the configuration that a run's folder was made with.

    Raises:
        UserError: ``path`` cannot be read, or is not a configuration.
    """
    try:
        return read_yaml(path, MOST_CONFIG)
    except TypeError:
        raise UserError(
            f"{path}: is not a run's configuration; start from scratch with force=true"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_result_record(folder: Path) -> dict[str, Any] | None:
    """Return the fields of the result in ``folder``; None if no run has finished there.

    Raises:
        UserError: the file is not a JSON object.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return read_json(path, MOST_RESULT)
    except (OSError, ValueError) as error:
        raise _not_a_result(path, error) from None


def read_result(folder: Path, kind: type[R]) -> R | None:
    """Return the result in ``folder``, of class ``kind``; None if no run has finished there.

    Raises:
        UserError: the file is not such a result.
    """
    record = read_result_record(folder)
    try:
        return None if record is None else kind.from_json(record)
    except ValueError as error:
        raise _not_a_result(folder / RESULT, error) from None


def _not_a_result(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"{path}: is not a result ({reason}); start from scratch with force=true")


def archive_run(folder: Path) -> None:
    """Move a run's folder into ``.old/`` beside it, and begin a new one in its place.

    Its status tells which sweeps did that, so that a job that comes back goes on with it. A
    folder in which nothing but a status stands is left where it is.

    Raises:
        UserError: it cannot be moved.
        OSError: the new one cannot be written.
    """
    status = read_status(folder)
    if any((folder / name).exists() for name in (CONFIG, LAST, PREVIOUS, RESULT)):
        _move_to_old(folder)
    told = {"command": status["command"]} if "command" in status else {}
    sweep = current_sweep()
    forced = [*forced_in(status), *([sweep] if sweep else [])]
    write_queued(folder, forced=forced, **told)


def write_queued(folder: Path, **details: Any) -> None:
    """Say that the run in ``folder``, which is made if it is missing, is to be started.

    Raises:
        BusyError: another process is at work in it.
        OSError: it cannot be written.
    """
    make_durable_folder(folder)
    lock = FolderLock(folder)
    lock.acquire(watch=False)  # a process that died there is handled by its own job
    try:
        write_status(folder, "queued", still_ours=lock.check, **details)
    finally:
        lock.release()


def _move_to_old(folder: Path) -> None:
    old, lock = folder.parent / ".old", FolderLock(folder)
    try:
        lock.acquire()
        if old.is_symlink():
            raise UserError(f"{old}: is a symbolic link; put the folder itself there")
        make_durable_folder(old)
        target = old / f"{folder.name}-{_last_put_aside(folder) + 1}"
        lock.check()
        folder.rename(target)
        fsync_folder(old)
        fsync_folder(folder.parent)
        remove_lock_file(target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be moved to {old} ({error.strerror})") from None
    finally:
        lock.release()


def _last_put_aside(folder: Path) -> int:
    """Return the number of the latest run that was put aside from ``folder``, or 0."""
    names = [path.name for path in (folder.parent / ".old").glob(f"{folder.name}-*")]
    numbers = [name.removeprefix(f"{folder.name}-") for name in names]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)
