"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from sskd.errors import UserError


def safe_join(folder: Path, *parts: str) -> Path:
    """Return the path ``parts`` below ``folder``, which itself may be a link.

    Raises:
        UserError: one of ``parts`` is a symbolic link, which may lead elsewhere.
    """
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise UserError(
                f"{path}: is a symbolic link, which may lead out of {folder}; put the folder "
                "itself there, or name the other place with runs=FOLDER"
            )
    return path


def expanded(path: str | Path) -> Path:
    """Return ``path`` with the home folder that a leading ``~`` stands for.

    A relative path starts from the folder in which the command was started. It becomes absolute
    if Hydra has changed to another folder for the job (``hydra.job.chdir``).
    """
    try:
        return _start_of_command() / Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{path}: there is no home folder for {user}; write the folder's whole path"
        ) from None


def _start_of_command() -> Path:
    """Return the folder in which the command was started, empty if that is the current one."""
    if not HydraConfig.initialized():
        return Path()
    start = Path(HydraConfig.get().runtime.cwd)
    return Path() if start == Path.cwd() else start
