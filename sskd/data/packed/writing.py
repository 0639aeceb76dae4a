"""Packing the images of a folder into one file: by several threads, and resumable.

The temporary file ``.NAME.pack.part`` has the records that are done. It needs no other state: the
command that continues it reads these records, checks them, and cuts off what a killed process left
incomplete. At the end it gets its index and its final name.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout

from sskd.data.decode import quiet_pillow, read_as
from sskd.data.digests import digest_line
from sskd.data.listing import Listing
from sskd.data.packed.file import (
    HEADER,
    MAGIC,
    Entry,
    Index,
    PackedFile,
    Record,
    build_index,
    entry_of,
    footer_of,
    open_packed,
    read_entry,
)
from sskd.data.packed.jpeg import QUALITY, SHORT_SIDE, to_jpeg
from sskd.data.packed.workers import available_cores
from sskd.data.reading import class_names
from sskd.errors import UserError
from sskd.files import fsync_folder, make_durable_folder, path_in_errors
from sskd.image_progress import ImageProgress
from sskd.output import say
from sskd.turns import outside_turn

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 16  # images that are read before they are written, for each thread
_AT_ONCE = 2000  # files whose status a thread reads at once
Listings = tuple[Listing, Listing]


def open_or_pack(path: Path, root: Path, listings: Listings) -> PackedFile:
    """Return the packed file ``path`` of the listed images, which is made if it is not there.

    It is made again if the folder ``root`` has changed since: names, sizes or modification times.

    Raises:
        UserError: it is damaged, the folder cannot be written to, or an image cannot be read.
    """
    stamp = stamp_of(root, listings)
    try:
        if (found := _if_current(path, stamp)) is not None:
            return found
        make_durable_folder(path.parent)
        with outside_turn(), _only_one(path):
            # Another process may have packed them meanwhile.
            if (found := _if_current(path, stamp)) is None:
                _pack(path, root, listings, stamp)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror}; the images are packed there once, so set "
            "dataset.packed=FOLDER to a folder on a disk with space that you may write to"
        ) from error
    return found or open_packed(path)


def stamp_of(root: Path, listings: Listings) -> bytes:
    """Return a digest of what shows that the listed files, or the way to pack them, have changed.

    It covers the paths, sizes and modification times of the files.

    Raises:
        UserError: a file is not there.
    """
    digest = hashlib.sha256(f"{SHORT_SIDE} {QUALITY}\n".encode())

    def read(paths: Sequence[str]) -> bytes:
        return b"".join(_status_line(root, path) for path in paths)

    paths = [path for listing in listings for path in listing.paths]
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        for lines in pool.map(read, parts):
            digest.update(lines)
    return digest.digest()


def _status_line(root: Path, path: str) -> bytes:
    try:
        status = os.stat(f"{root}/{path}")  # noqa: PTH116  a Path for each takes much longer
    except OSError as error:
        raise UserError(f"{root}/{path} cannot be read as an image: {error.strerror}") from error
    return os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode()


def _if_current(path: Path, stamp: bytes) -> PackedFile | None:
    """Return the packed file, if it is there and its images have not changed."""
    try:
        found = open_packed(path)
    except FileNotFoundError:
        return None
    return found if found.stamp == stamp else None


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Wait until no other process packs into ``path``, and keep others out."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{path}: waits for another process, which packs the images")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pack(path: Path, root: Path, listings: Listings, stamp: bytes) -> None:
    """Write the packed file, from its start or from where an earlier process stopped."""
    paths = [each for listing in listings for each in listing.paths]
    part = path.with_name(f".{path.name}.part")
    with path_in_errors(part), part.open("r+b" if part.exists() else "w+b") as stream:
        entries = _resume(stream, stamp, len(paths))
        say(
            f"{path}: packs {len(paths):,} images of {root}"
            + (f"; {len(entries):,} are done" if entries else "")
        )
        with ImageProgress(f"{path.name}: packing", len(paths), done=len(entries)) as progress:
            for record in _records(root, paths[len(entries) :]):
                stream.write(record)
                entries.append(entry_of(record))
                progress.advance(1)
        index = _index(entries, paths, listings).to_bytes()
        stream.write(index + footer_of(stream.tell(), index))
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    part.replace(path)
    fsync_folder(path.parent)
    say(f"{path}: packed {len(paths):,} images, {size / 2**20:,.0f} MiB")


def _index(entries: Sequence[Entry], paths: Sequence[str], listings: Listings) -> Index:
    digest = hashlib.sha256()
    for path, entry in zip(paths, entries, strict=True):
        digest.update(digest_line(path, entry.source.hex()))
    train, test = listings
    return build_index(
        entries,
        paths,
        [*train.labels, *test.labels],
        classes=class_names(train.classes),
        digest=digest.hexdigest(),
        train=len(train.paths),
    )


def _resume(stream: BinaryIO, stamp: bytes, most: int) -> list[Entry]:
    """Return the entries of the finished records in a temporary file, and cut off the rest.

    A file of other images begins again.
    """
    header = HEADER.pack(MAGIC, stamp)
    entries: list[Entry] = []
    if stream.read(HEADER.size) == header:
        while len(entries) < most and (entry := read_entry(stream)) is not None:
            entries.append(entry)
    end = HEADER.size + sum(each.length for each in entries)
    stream.seek(0)
    stream.write(header)
    stream.truncate(end)
    stream.seek(end)
    return entries


def _records(root: Path, paths: Sequence[str]) -> Iterator[bytes]:
    """Yield the record of each image, in order."""

    def read(path: str) -> bytes:
        image, digest = read_as(root / path, to_jpeg)
        return Record(image, bytes.fromhex(digest)).to_bytes()

    # Threads suffice: Pillow releases the interpreter lock while it decodes, scales and encodes.
    threads = available_cores()
    with quiet_pillow(), ThreadPoolExecutor(threads) as pool:
        yield from _map_ahead(pool, read, paths, most=_AHEAD * threads)


def _map_ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T], *, most: int
) -> Iterator[R]:
    """Do what ``pool.map`` does, with at most ``most`` results in memory."""
    started: deque[Future[R]] = deque()
    try:
        for item in items:
            started.append(pool.submit(function, item))
            if len(started) == most:
                yield started.popleft().result()
        while started:
            yield started.popleft().result()
    finally:
        for each in started:
            each.cancel()
