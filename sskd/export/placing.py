"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sskd.errors import UserError
from sskd.files import fsync_folder, make_durable_folder
from sskd.training.signals import raise_on_sigterm


def refuse_existing(folders: Sequence[Path], card: str, *, force: bool) -> None:
    """Raise UserError if one of ``folders`` holds something.

    With ``force``, only if that is not an export, which the file ``card`` shows.
    """
    for folder in folders:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            continue
        if not force:
            raise UserError(
                f"{folder}: exists; add --force to replace it (the old one moves to .old/ beside "
                "it), or name another folder with --out"
            )
        if not (folder / card).is_file():
            raise UserError(f"{folder}: exists and is no export; name another folder with --out")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Yield an empty folder inside ``out``, which is created; both disappear if nothing is placed.

    Raises:
        OSError: ``out`` cannot be created.
        Interrupted: SIGTERM came.
    """
    created = [each for each in (out, *out.parents) if not each.exists()]
    make_durable_folder(out)
    folder = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=out))
    try:
        with raise_on_sigterm():
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # the first one that holds something ends it
            for each in created:
                each.rmdir()


def place(staged: Path, folder: Path) -> None:
    """Move the complete folder ``staged`` to ``folder``; an old one moves to ``.old/`` beside it.

    Raises:
        OSError: it cannot be moved.
    """
    for path in staged.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    fsync_folder(staged)
    if folder.exists() and any(folder.iterdir()):
        old = folder.parent / ".old"
        make_durable_folder(old)
        folder.rename(_free(old, folder.name))
    staged.rename(folder)
    fsync_folder(folder.parent)


def _free(old: Path, name: str) -> Path:
    number = 1
    while (old / f"{name}-{number}").exists():
        number += 1
    return old / f"{name}-{number}"
