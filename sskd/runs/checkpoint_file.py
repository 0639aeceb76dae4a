"""Torch files that carry their own digest, so that damage shows before anything is made of them.

A torch file is a zip archive. The SHA-256 of its bytes stands in the comment that such an archive
may end with, so that every reader of torch files opens it as before.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sskd.errors import CorruptFileError, UserError
from sskd.files import StillOurs, open_bounded, write_atomically
from sskd.models.safe_load import refuse_bombs
from sskd.runs.names import MOST_CHECKPOINT

_MARK = b"sha256 "
_COMMENT = len(_MARK) + 2 * hashlib.sha256().digest_size
_LENGTH = 2  # bytes in front of a comment that tell how long it is, little-endian
_END = b"PK\5\6"  # begins the last 22 bytes of an archive without a comment


def save_checkpoint(
    path: Path,
    content: Mapping[str, Any],
    *,
    keep: Path | None = None,
    still_ours: StillOurs | None = None,
) -> None:
    """Write ``content`` to ``path`` as ``torch.save`` does, sealed, whole or not at all.

    ``keep`` and ``still_ours`` are as in ``sskd.files.write_atomically``.
    """
    archive = io.BytesIO()
    torch.save(dict(content), archive)
    data = archive.getbuffer()

    def write(stream: BinaryIO) -> None:
        stream.write(data[:-_LENGTH])
        stream.write(checksum_comment(data))

    write_atomically(path, write, keep=keep, still_ours=still_ours)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return what ``save_checkpoint`` wrote, on the CPU; nothing but tensors and plain values.

    A torch file without a seal, of a version that had none, is read as well.

    Raises:
        CorruptFileError: the bytes are not those that were written, or no such file's.
        OSError: the file cannot be read, for lack of memory perhaps, which says nothing about
            what it holds.
    """
    try:
        return _load(path)
    except MemoryError:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from None


def _load(path: Path) -> dict[str, Any]:
    data = _read_archive(path)
    if data[-_COMMENT:].startswith(_MARK):
        archive = memoryview(data)[: -_COMMENT - _LENGTH]
        if data[len(archive) :] != _seal_of(archive):
            raise CorruptFileError(path.name, "its checksum differs")
    try:
        refuse_bombs(io.BytesIO(data), path)
        with warnings.catch_warnings():  # of what ends in an error anyway
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except UserError as error:
        raise CorruptFileError(path.name, str(error)) from error
    except Exception as error:  # torch has a dozen types of error for a damaged file
        raise CorruptFileError(path.name, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CorruptFileError(path.name, "it is not a run's")
    return content


def _read_archive(path: Path) -> bytes:
    """Return what is in the file; CorruptFileError if it is too large or not a run's."""
    try:
        with open_bounded(path, MOST_CHECKPOINT) as (stream, status):
            stream.seek(max(status.st_size - _COMMENT, 0))
            end = stream.read(_COMMENT)
            bare = end[-22:].startswith(_END) and end.endswith(bytes(_LENGTH))
            if not end.startswith(_MARK) and not bare:
                raise ValueError("it cannot be read (its end is missing)")
            stream.seek(0)
            return stream.read(status.st_size)
    except ValueError as error:
        raise CorruptFileError(path.name, str(error)) from None


def checksum_comment(archive: bytes | memoryview) -> bytes:
    """Return what takes the place of the last bytes of ``archive``, the length of no comment."""
    return _seal_of(memoryview(archive)[:-_LENGTH])


def _seal_of(archive: memoryview) -> bytes:
    """Return what follows ``archive``, which lacks the length of no comment; it is not copied."""
    digest = hashlib.sha256(archive)
    digest.update(bytes(_LENGTH))
    comment = _MARK + digest.hexdigest().encode()
    return len(comment).to_bytes(_LENGTH, "little") + comment
