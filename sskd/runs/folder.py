"""The folder of a run that is not open: its name, its configuration, its result, its archive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import OmegaConf

from sskd.errors import UserError, one_line
from sskd.files import StillOurs, fsync_folder, make_durable_folder, safe_join, write_text
from sskd.runs.lock import FolderLock, remove_lock_file
from sskd.runs.names import CONFIG, LAST, MOST_CONFIG, MOST_RESULT, PREVIOUS, RESULT
from sskd.runs.result import Result
from sskd.runs.status import current_sweep, read_status, write_status
from sskd.runs.untrusted import read_json, read_yaml

if TYPE_CHECKING:
    from sskd.config import Config  # imports torch, which reading a folder does not need

R = TypeVar("R", bound=Result)


def run_folder(config: Config, difference: Mapping[str, Any]) -> Path:
    """Return the folder of a run below ``config.runs``.

    It is ``<dataset>/scratch/<arch>/seed<k>`` or ``<dataset>/distill/<teacher>-<student>/<method>/
    seed<k>``, followed by 8 hex digits of a hash of ``difference`` if that is not empty, so that
    two configurations never share a folder.

    Args:
        difference: the settings that differ from the recipe, by dotted key.

    Raises:
        UserError: the folder, or one between it and ``config.runs``, is a symbolic link.
    """
    if config.teacher is None:
        parts = ["scratch", config.student.name]
    else:
        pair = f"{config.teacher.name}-{config.student.name}"
        parts = ["distill", pair, config.method.name]
    name = f"seed{config.seed}"
    if difference:
        text = json.dumps(difference, sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return safe_join(Path(config.runs), config.dataset.name, *parts, name)


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the configuration that a run's folder was made with.

    Raises:
        UserError: ``path`` cannot be read, or is not a configuration.
    """
    try:
        return read_yaml(path, MOST_CONFIG)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def write_config_file(
    path: Path, config: Mapping[str, Any], *, still_ours: StillOurs | None = None
) -> None:
    """Write the full ``config`` of a run as YAML.

    Raises:
        UserError: it is too long to be read again, for example because of its tags.
    """
    text = OmegaConf.to_yaml(OmegaConf.create(dict(config)))
    size = len(text.encode())
    if size > MOST_CONFIG:
        raise UserError(
            f"{path}: the configuration has {size} bytes, but at most {MOST_CONFIG} are read; "
            "shorten its lists and texts, such as wandb.tags"
        )
    write_text(path, text, still_ours=still_ours)


def read_result(folder: Path, kind: type[R]) -> R | None:
    """Return the result in ``folder``, of class ``kind``; None if no run has finished there.

    Raises:
        UserError: the file is not such a result.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        return kind.from_json(read_json(path, MOST_RESULT))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UserError(
            f"{path}: is not a result ({reason}); start from scratch with force=true"
        ) from None


def archive_run(folder: Path) -> None:
    """Move a run's folder into ``.old/`` beside it, and create a new one in its place.

    The status of the new one names the sweeps that did so, so that a requeued job resumes the new
    run. A folder with nothing but a status stays in place.

    Raises:
        UserError: the folder cannot be moved.
        OSError: the new one cannot be written.
    """
    status = read_status(folder)
    if any((folder / name).exists() for name in (CONFIG, LAST, PREVIOUS, RESULT)):
        _move_to_old(folder)
    sweep = current_sweep()
    forced = (*status.forced, *([sweep] if sweep else []))
    write_queued(folder, forced=forced, command=status.command)


def write_queued(folder: Path, **details: Any) -> None:
    """Write the status of a run that waits for its start in ``folder``, created if missing.

    Raises:
        BusyError: another process is working in it.
        OSError: it cannot be written.
    """
    make_durable_folder(folder)
    lock = FolderLock(folder)
    lock.acquire(watch=False)  # the run's own job handles a process that died there
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
        target = old / f"{folder.name}-{_last_archived(folder) + 1}"
        lock.check()
        folder.rename(target)
        fsync_folder(old)
        fsync_folder(folder.parent)
        remove_lock_file(target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be moved to {old} ({error.strerror})") from None
    finally:
        lock.release()


def _last_archived(folder: Path) -> int:
    """Return the highest number of an archived run of ``folder``, or 0."""
    names = [path.name for path in (folder.parent / ".old").glob(f"{folder.name}-*")]
    numbers = [name.removeprefix(f"{folder.name}-") for name in names]
    return max((int(number) for number in numbers if number.isdecimal()), default=0)
