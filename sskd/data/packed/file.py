"""The packed file: JPEG files one after another, then an index, then a footer.

::

    header   magic, stamp (32 bytes)
    records  length and CRC32 of the body, and the body: height, width, the SHA-256 of the source
             image, its fingerprint, and a JPEG file
    index    safetensors: the start and the checksum of each record, labels, sizes, names
    footer   where the index begins, its length, its SHA-256, magic

Only numbers and text are read, so reading the file runs no code. At the start of a run the length
of the file and the digest of the index are checked. A record is checked when it is read, because
hashing the whole file at each start would take too long.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sskd.data.cache import read_metadata
from sskd.data.decode import MAX_PIXELS
from sskd.data.packed.jpeg import Encoded, decode
from sskd.errors import UserError, one_line

MAGIC = b"SSKDPAK2"  # changes with the format
HEADER = struct.Struct("<8s32s")
PREFIX = struct.Struct("<II")  # of a record: the length of its body, and the body's CRC32
BODY = struct.Struct("<II32s32s")  # the start of a body: what ``Entry`` has of it, in order
FOOTER = struct.Struct("<QQ32s8s")
METADATA_KEY = "about"
MOST_BODY = 2**28  # bytes: more than a JPEG file of 67 megapixels has
SHORTEST, LONGEST = PREFIX.size + BODY.size, PREFIX.size + MOST_BODY  # bytes of a record
MOST_INDEX = 2**31  # bytes: more than ten million images need
# What reading an index raises if it was not written here; RecursionError: JSON of many levels.
_WRONG_CONTENT = (
    *(SafetensorError, struct.error, ValueError, TypeError),
    *(LookupError, AttributeError, RecursionError),
)


class Record(NamedTuple):
    """A packed image, and what identifies the file that it was made of.

    Attributes:
        source: the SHA-256 of the file's content.
        fingerprint: what shows that the file has changed (``sskd.data.packed.writing``).
    """

    image: Encoded
    source: bytes
    fingerprint: bytes

    def to_bytes(self) -> bytes:
        """Return the record as the file holds it."""
        known = BODY.pack(self.image.height, self.image.width, self.source, self.fingerprint)
        body = known + self.image.content
        return PREFIX.pack(len(body), zlib.crc32(body)) + body


class Entry(NamedTuple):
    """What is known of a record without its image; ``length`` includes its prefix."""

    length: int
    checksum: int
    height: int
    width: int
    source: bytes
    fingerprint: bytes


def entry_of(record: bytes) -> Entry:
    """Return the entry of a whole record."""
    _, checksum = PREFIX.unpack_from(record)
    return Entry(len(record), checksum, *BODY.unpack_from(record, PREFIX.size))


def read_entry(stream: BinaryIO) -> Entry | None:
    """Read the next record of a file; None if it is incomplete or damaged."""
    prefix = stream.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        return None
    length, checksum = PREFIX.unpack(prefix)
    if not BODY.size < length <= MOST_BODY:
        return None
    body = stream.read(length)
    if len(body) < length or zlib.crc32(body) != checksum:
        return None
    return entry_of(prefix + body)


@dataclass(frozen=True)
class Index:
    """What is known of all images without reading them.

    Attributes:
        classes: their names.
        digest: the SHA-256 of the paths and contents of the source images.
        train: the number of training images, which come first; the others are test images.
        labels: int64 [N].
        starts: of the records in the file, and the end of the last one, int64 [N + 1].
        checksums: the CRC32 of each record's body, int64 [N].
        sizes: height and width of each image, int64 [N, 2].
        names: the paths of the source images, each followed by a zero byte.
    """

    classes: tuple[str, ...]
    digest: str
    train: int
    labels: Tensor
    starts: Tensor
    checksums: Tensor
    sizes: Tensor
    names: bytes

    def to_bytes(self) -> bytes:
        """Return the index as the file holds it."""
        about = {"classes": self.classes, "digest": self.digest, "train": self.train}
        tensors = {name: getattr(self, name) for name in _TENSORS}
        names = np.frombuffer(bytearray(self.names), np.uint8)
        return save(
            {**tensors, "names": torch.from_numpy(names)}, {METADATA_KEY: json.dumps(about)}
        )

    def name(self, position: int) -> str:
        """Return the path of a source image relative to the root."""
        return os.fsdecode(self.names.split(b"\0")[position])


_TENSORS = ("labels", "starts", "checksums", "sizes")


def build_index(
    entries: Sequence[Entry], paths: Sequence[str], labels: Sequence[int], **known: Any
) -> Index:
    """Return the index of ``entries`` in their order; ``known`` are its other fields."""
    lengths = np.array([HEADER.size, *(each.length for each in entries)])
    return Index(
        labels=torch.tensor(labels),
        starts=torch.from_numpy(lengths.cumsum()),
        checksums=torch.tensor([each.checksum for each in entries]),
        sizes=torch.tensor([(each.height, each.width) for each in entries]),
        names=b"".join(os.fsencode(path) + b"\0" for path in paths),
        **known,
    )


def footer_of(start: int, index: bytes) -> bytes:
    """Return the footer of a file whose ``index`` begins at ``start``."""
    return FOOTER.pack(start, len(index), hashlib.sha256(index).digest(), MAGIC)


class _Content:
    """The bytes of a file that stays open: another file in its place does not disturb a run.

    A copy in a process that is started and not forked opens the file again.
    """

    def __init__(self, path: Path) -> None:
        # A pipe would block until a writer opens it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._path, self._file = path, os.fdopen(descriptor, "rb")

    def __reduce__(self) -> tuple[Any, ...]:
        return _Content, (self._path,)

    def size(self) -> int:
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        return status.st_size

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, start)  # which moves no position


@dataclass(frozen=True)
class PackedFile:
    """A packed file that is open for reading; processes may share it.

    ``stamp`` is the SHA-256 of the fingerprints of the images that were packed
    (``sskd.data.packed.writing.fingerprints_of``).
    """

    path: Path
    content: _Content
    stamp: bytes
    index: Index

    def sizes(self, positions: Sequence[int]) -> Tensor:
        """Return the height and the width of images: int64 [N, 2]."""
        return self.index.sizes[positions]

    def image(self, position: int) -> Tensor:
        """Decode an image: uint8 [3, H, W].

        Raises:
            UserError: the file is damaged there, or cannot be read; the message names the image.
        """
        first, end = (int(each) for each in self._starts[position : position + 2])
        try:
            record = self.content.read(first, end - first)
        except OSError as error:
            reason = f"the image {self.index.name(position)} cannot be read ({one_line(error)})"
            raise unreadable_error(self.path, reason) from error
        try:
            if zlib.crc32(record[PREFIX.size :]) != int(self.index.checksums[position]):
                raise ValueError("its checksum differs")
            height, width = self.index.sizes[position].tolist()
            return decode(record[PREFIX.size + BODY.size :], height, width)
        except Exception as error:  # Pillow raises almost any type of error for a broken file
            reason = f"the image {self.index.name(position)} is damaged ({one_line(error)})"
            raise damaged_error(self.path, reason) from error

    @property
    def _starts(self) -> NDArray[np.int64]:
        return self.index.starts.numpy()


def unreadable_error(path: Path, reason: str) -> UserError:
    """Return the error for a packed file that the system cannot read; it may be intact."""
    return UserError(
        f"{path}: {reason}; run the command again, and check the disk if the error occurs again"
    )


def damaged_error(path: Path, reason: str) -> UserError:
    """Return the error for a packed file of wrong content."""
    return UserError(
        f"{path}: {reason}; delete the file, and the next start packs the images again"
    )


def open_packed(path: Path) -> PackedFile:
    """Open a packed file, and check its length and its index.

    Raises:
        OSError: it cannot be opened; FileNotFoundError, if there is none.
        UserError: it is damaged, is another file, or cannot be read.
    """
    content = _Content(path)
    try:
        return _read(path, content)
    except OSError as error:
        raise unreadable_error(path, f"cannot be read ({one_line(error)})") from error
    # A file that was made on purpose can have an index of any content.
    except _WRONG_CONTENT as error:
        raise damaged_error(path, f"is damaged ({one_line(error)})") from error


def _read(path: Path, content: _Content) -> PackedFile:
    size = content.size()
    magic, stamp = HEADER.unpack(content.read(0, HEADER.size))
    footer = content.read(max(size - FOOTER.size, 0), FOOTER.size)
    start, length, digest, last = FOOTER.unpack(footer)
    if magic != MAGIC or last != MAGIC or start + length + FOOTER.size != size:
        raise ValueError("it is cut short, or is not a packed file of this version")
    if length > MOST_INDEX:
        raise ValueError(f"its index has {length:,} bytes, and the limit is {MOST_INDEX:,}")
    index = content.read(start, length)
    if hashlib.sha256(index).digest() != digest:
        raise ValueError("the digest of its index differs")
    return PackedFile(path, content, stamp, _parse_index(index, start))


def _parse_index(content: bytes, end: int) -> Index:
    """Return the index of a file whose records end at ``end``; ValueError if it does not fit."""
    tensors, about = load(content), json.loads(read_metadata(content)[METADATA_KEY])
    index = Index(
        classes=tuple(about["classes"]),
        digest=about["digest"],
        train=about["train"],
        names=_checked(tensors["names"], torch.uint8, 1).numpy().tobytes(),
        **{name: tensors[name] for name in _TENSORS},
    )
    _validate(index, end)
    return index


def _validate(index: Index, end: int) -> None:
    """Raise ValueError if the parts of an index do not fit; the records end at ``end``."""
    if not all(isinstance(each, str) for each in (index.digest, *index.classes)):
        raise ValueError("its digest or a class is not text")
    for name in ("labels", "starts", "checksums"):
        _checked(getattr(index, name), torch.int64, 1)
    sizes = _checked(index.sizes, torch.int64, 2)
    count = len(index.labels)
    lengths = (len(index.starts) - 1, len(index.checksums), index.names.count(b"\0"))
    if lengths != (count,) * 3 or sizes.shape != (count, 2):
        raise ValueError("the parts of its index differ in length")
    if type(index.train) is not int or not 0 <= index.train <= count:
        raise ValueError(f"its number of training images is not between 0 and {count:,}")
    if int(index.starts[0]) != HEADER.size or int(index.starts[-1]) != end:
        raise ValueError("its records are not between its header and its index")
    # Compared and not subtracted, because a difference could overflow.
    if not (index.starts[1:] > index.starts[:-1]).all():
        raise ValueError("the starts of its records do not increase")
    lengths_of_records = index.starts.diff()  # each is between 0 and ``end``
    if not ((lengths_of_records > SHORTEST) & (lengths_of_records <= LONGEST)).all():
        raise ValueError("a record is too short or too long")
    if not ((sizes >= 1) & (sizes <= MAX_PIXELS)).all() or (sizes.prod(1) > MAX_PIXELS).any():
        raise ValueError("an image has no pixels or too many")


def _checked(tensor: Tensor, dtype: torch.dtype, dimensions: int) -> Tensor:
    if tensor.dtype != dtype or tensor.dim() != dimensions:
        raise ValueError("a part of its index has another type or shape")
    return tensor
