"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path

from sskd.errors import UserError


def expanded(path: str | Path) -> Path:
    """Return ``path`` with the home folder that a leading ``~`` stands for."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{path}: there is no home folder for {user}; write the folder's whole path"
        ) from None
