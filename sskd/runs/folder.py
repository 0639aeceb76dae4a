"""What stands in the folder of a run that is not open here, and how it makes way for another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sskd.errors import UserError
from sskd.files import fsync_folder, is_regular_file, make_durable_folder, read_bounded_text
from sskd.runs.lock import FolderLock, remove_lock_file
from sskd.runs.names import CONFIG, LAST, MOST_CONFIG, MOST_RESULT, PREVIOUS, RESULT
from sskd.runs.status import current_sweep, forced_in, read_status, write_status

_DEEPEST = 50  # levels; a configuration has five


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the configuration that a run's folder was made with; UserError if it is not one."""
    try:
        if not is_regular_file(path):
            raise ValueError("it is not a regular file" if path.exists() else "it is missing")
        text = read_bounded_text(path, MOST_CONFIG)
        _refuse_odd_yaml(text)
        config = OmegaConf.to_container(OmegaConf.create(text))
        str(config)  # ValueError for an integer of more digits than Python writes
    except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a run's configuration; start afresh with force=true")
    return {str(key): value for key, value in config.items()}


def _refuse_odd_yaml(text: str) -> None:
    """Raise ValueError for what no run writes, and would take without bound, or break, a reader."""
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, which can grow without bound")
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise ValueError("it is a single value")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of the run in ``folder``, or None where none has finished."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(read_bounded_text(path, MOST_RESULT)) if is_regular_file(path) else None
    except (OSError, ValueError, RecursionError):
        result = None
    if not isinstance(result, dict):
        raise UserError(f"{path}: is not a result; start afresh with force=true")
    return result


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
