"""Torch files whose corruption is found before their content is used.

A torch file is a zip archive, which holds a CRC-32 of each of its records.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sskd.errors import CorruptFileError, UserError
from sskd.files import StillOurs, read_bounded, write_atomically
from sskd.models.safe_load import refuse_bombs
from sskd.runs.names import MOST_CHECKPOINT


def save_checkpoint(
    path: Path,
    content: Mapping[str, Any],
    *,
    keep: Path | None = None,
    still_ours: StillOurs | None = None,
) -> None:
    """Write ``content`` to ``path`` atomically, as ``torch.save`` does.

    ``keep`` and ``still_ours`` are as in ``sskd.files.write_atomically``.
    """
    archive = io.BytesIO()  # torch turns the OSError of a full disk into a RuntimeError
    torch.save(dict(content), archive)
    write_atomically(
        path,
        lambda stream: stream.write(archive.getbuffer()),
        keep=keep,
        still_ours=still_ours,
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU: tensors and plain values, nothing else.

    Raises:
        CorruptFileError: the file does not have the content that was written.
        OSError: the file cannot be read at the moment, for example for lack of memory.
    """
    try:
        return _load(path)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from None


def _load(path: Path) -> dict[str, Any]:
    try:
        data = read_bounded(path, MOST_CHECKPOINT)
    except ValueError as error:
        raise CorruptFileError(path.name, str(error)) from None
    try:
        refuse_bombs(io.BytesIO(data), path)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            corrupt = archive.testzip()
        if corrupt is not None:
            raise CorruptFileError(path.name, f"the checksum of {corrupt!r} differs")
        with warnings.catch_warnings():  # a warning would only repeat the error below
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (MemoryError, CorruptFileError):
        raise
    except UserError as error:
        raise CorruptFileError(path.name, str(error)) from error
    except Exception as error:  # torch has a dozen types of error for a corrupt file
        raise CorruptFileError(path.name, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CorruptFileError(path.name, "it is not a run's checkpoint")
    return content
