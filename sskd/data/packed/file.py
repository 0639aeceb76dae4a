"""The packed file: JPEG files behind each other, then an index, then a footer.

::

    header   magic, stamp (32 bytes)
    records  length and CRC32 of the body, and the body: height, width, the SHA-256 of the source
             image, and a JPEG file
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
from sskd.data.packed.jpeg import Encoded, decode
from sskd.errors import UserError, one_line

MAGIC = b"SSKDPAK1"  # changes with the format
HEADER = struct.Struct("<8s32s")
PREFIX = struct.Struct("<II")  # of a record: the length of its body, and the body's CRC32
BODY = struct.Struct("<II32s")  # the start of a body: height, width, digest of the source
FOOTER = struct.Struct("<QQ32s8s")
METADATA_KEY = "about"
MOST_BODY = 2**28  # bytes: more than a JPEG file of 67 megapixels has


class Record(NamedTuple):
    """A packed image, and the SHA-256 of the file that it was made of."""

    image: Encoded
    source: bytes

    def to_bytes(self) -> bytes:
        """Return the record as the file holds it."""
        body = BODY.pack(self.image.height, self.image.width, self.source) + self.image.content
        return PREFIX.pack(len(body), zlib.crc32(body)) + body


class Entry(NamedTuple):
    """What the index keeps of a record; ``length`` includes its prefix."""

    length: int
    checksum: int
    height: int
    width: int
    source: bytes


def entry_of(record: bytes) -> Entry:
    """Return the entry of a whole record."""
    _, checksum = PREFIX.unpack_from(record)
    height, width, source = BODY.unpack_from(record, PREFIX.size)
    return Entry(len(record), checksum, height=height, width=width, source=source)


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

    ``stamp`` is that of the listing it was made of (``sskd.data.packed.writing.stamp_of``).
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
            UserError: the file is damaged there; the message names the image.
        """
        first, end = (int(each) for each in self._starts[position : position + 2])
        try:
            record = self.content.read(first, end - first)
            if zlib.crc32(record[PREFIX.size :]) != int(self.index.checksums[position]):
                raise ValueError("its checksum differs")
            return decode(record[PREFIX.size + BODY.size :])
        except (OSError, ValueError) as error:
            reason = f"the image {self.index.name(position)} is damaged ({one_line(error)})"
            raise damaged_error(self.path, reason) from error

    @property
    def _starts(self) -> NDArray[np.int64]:
        return self.index.starts.numpy()


def damaged_error(path: Path, reason: str) -> UserError:
    """Return the error for the packed file ``path``."""
    return UserError(
        f"{path}: {reason}; delete the file, and the next start packs the images again"
    )


def open_packed(path: Path) -> PackedFile:
    """Open a packed file, and check its length and its index.

    Raises:
        OSError: it cannot be opened; FileNotFoundError, if there is none.
        UserError: it is damaged, or is another file.
    """
    content = _Content(path)
    try:
        return _read(path, content)
    # A file that was made on purpose can have an index of any content.
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, struct.error) as error:
        raise damaged_error(path, f"is damaged ({one_line(error)})") from error


def _read(path: Path, content: _Content) -> PackedFile:
    size = content.size()
    magic, stamp = HEADER.unpack(content.read(0, HEADER.size))
    footer = content.read(max(size - FOOTER.size, 0), FOOTER.size)
    start, length, digest, last = FOOTER.unpack(footer)
    if magic != MAGIC or last != MAGIC or start + length + FOOTER.size != size:
        raise ValueError("it is cut short, or is no packed file of this version")
    index = content.read(start, length)
    if hashlib.sha256(index).digest() != digest:
        raise ValueError("the digest of its index differs")
    return PackedFile(path, content, stamp, _parse_index(index, start))


def _parse_index(content: bytes, end: int) -> Index:
    """Return the index of a file whose records end at ``end``; ValueError if it does not fit."""
    tensors, about = load(content), json.loads(read_metadata(content)[METADATA_KEY])
    names: bytes = tensors.pop("names").numpy().tobytes()
    index = Index(
        classes=tuple(about["classes"]),
        digest=about["digest"],
        train=about["train"],
        names=names,
        **{name: tensors[name] for name in _TENSORS},
    )
    count = len(index.labels)
    if (len(index.starts), len(index.checksums), names.count(b"\0")) != (count + 1, count, count):
        raise ValueError("the parts of its index differ in length")
    if index.starts[-1] != end:
        raise ValueError("its records do not end at its index")
    return index
