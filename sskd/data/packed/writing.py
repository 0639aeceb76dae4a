"""Packing the images of a folder into one file: by several threads, and resumable.

The temporary file ``.NAME.pack.part`` has the records that are done. It needs no other state: the
command that continues it reads these records, checks them, and cuts off what a killed process left
incomplete. At the end it gets its index and its final name.

A record keeps the fingerprint of its source: a digest of the path, the size, the modification time
and the way to pack it. So if a file has changed or was removed, the records before it still count.
"""

from __future__ import annotations

import hashlib
import os
import stat
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
_SHOWN = 3  # images that an error names
_DIGEST = hashlib.sha256().digest_size
Listings = tuple[Listing, Listing]
Fingerprinted = tuple[str, bytes]  # the path of an image, and its fingerprint


def open_or_pack(path: Path, root: Path, listings: Listings) -> PackedFile:
    """Return the packed file ``path`` of the listed images, which is made if it is not there.

    It is made again if the folder ``root`` has changed since: names, sizes or modification times.

    Raises:
        UserError: it is damaged, the folder cannot be written to, or an image cannot be read.
    """
    fingerprints = fingerprints_of(root, listings)
    stamp = hashlib.sha256(fingerprints).digest()
    try:
        if (found := _if_current(path, stamp)) is not None:
            return found
        make_durable_folder(path.parent)
        with outside_turn(), _only_one(path):
            # Another process may have packed them meanwhile.
            if (found := _if_current(path, stamp)) is None:
                _pack(path, root, listings, fingerprints)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror or error}; the images are packed "
            "there once, so set dataset.packed=FOLDER to a folder on a disk with space that you "
            "may write to"
        ) from error
    return found or open_packed(path)


def fingerprints_of(root: Path, listings: Listings) -> bytes:
    """Return the fingerprints of the listed files, 32 bytes each, one after another.

    Raises:
        UserError: a file is not there.
    """

    def read(paths: Sequence[str]) -> bytes:
        return b"".join(_fingerprint(root, path) for path in paths)

    paths = [path for listing in listings for path in listing.paths]
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    with ThreadPoolExecutor() as pool:
        return b"".join(pool.map(read, parts))


def _fingerprint(root: Path, path: str) -> bytes:
    try:
        status = os.stat(f"{root}/{path}")  # noqa: PTH116  a Path for each takes much longer
    except OSError as error:
        raise UserError(f"{root}/{path} cannot be read as an image: {error.strerror}") from error
    line = f"\0{status.st_size} {status.st_mtime_ns} {SHORT_SIDE} {QUALITY}"
    return hashlib.sha256(os.fsencode(path) + line.encode()).digest()


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
    lock = FileLock(_without_link(path.with_name(f".{path.name}.lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{path}: waiting for another process that is packing the images")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _pack(path: Path, root: Path, listings: Listings, fingerprints: bytes) -> None:
    """Write the packed file, from its start or from where an earlier process stopped."""
    paths = [each for listing in listings for each in listing.paths]
    starts = range(0, len(fingerprints), _DIGEST)
    sources = [*zip(paths, (fingerprints[i : i + _DIGEST] for i in starts), strict=True)]
    part = _without_link(path.with_name(f".{path.name}.part"))
    say(f"{path}: packs {len(paths):,} images of {root}")
    with path_in_errors(part), _opened(part) as stream:
        stamp = hashlib.sha256(fingerprints).digest()
        entries = _resume(stream, stamp, sources)
        if entries:
            say(f"{path}: {len(entries):,} images are packed already")
        _write_records(stream, root, sources, entries)
        index = _index(entries, paths, listings).to_bytes()
        stream.write(index + footer_of(stream.tell(), index))
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.tell()
    part.replace(path)
    fsync_folder(path.parent)
    say(f"{path}: packed {len(paths):,} images, {size / 2**20:,.0f} MiB")


def _without_link(path: Path) -> Path:
    """Return ``path``; UserError if it is a link, which could point to any file of this user."""
    if path.is_symlink():
        raise UserError(
            f"{path}: is a symbolic link, through which another file would be "
            "overwritten; remove it"
        )
    return path


def _opened(part: Path) -> BinaryIO:
    """Open the temporary file ``part``, which is made if it is missing, for reading and writing."""
    # The name is predictable, and the folder may belong to others.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(part, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{part}: is not a regular file; remove it")
    return os.fdopen(descriptor, "r+b")


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


def _resume(stream: BinaryIO, stamp: bytes, sources: Sequence[Fingerprinted]) -> list[Entry]:
    """Return the entries of the finished records in a temporary file, and cut off the rest.

    A record counts if it and all before it are of the images that are listed now.
    """
    entries: list[Entry] = []
    if stream.read(HEADER.size).startswith(MAGIC):
        with ImageProgress("checking the images that are packed", len(sources)) as progress:
            for _, fingerprint in sources:
                entry = read_entry(stream)
                if entry is None or entry.fingerprint != fingerprint:
                    break
                entries.append(entry)
                progress.advance(1)
    end = HEADER.size + sum(each.length for each in entries)
    stream.seek(0)
    stream.write(HEADER.pack(MAGIC, stamp))
    stream.truncate(end)
    stream.seek(end)
    return entries


def _write_records(
    stream: BinaryIO, root: Path, sources: Sequence[Fingerprinted], entries: list[Entry]
) -> None:
    """Write the records of the images after ``entries``, and add their entries.

    Raises:
        UserError: images cannot be read. All other images are written: if the unreadable images
            are removed, the next start adds only the index.
    """
    failed: list[UserError] = []
    done = len(entries)
    with ImageProgress("packing images", len(sources), done=done) as progress:
        for record in _records(root, sources[done:]):
            if isinstance(record, UserError):
                failed.append(record)
            else:
                stream.write(record)
                entries.append(entry_of(record))
            progress.advance(1)
    if failed:
        shown = "; ".join(str(each) for each in failed[:_SHOWN])
        more = f"; and {len(failed) - _SHOWN:,} more" if failed[_SHOWN:] else ""
        raise UserError(
            f"{shown}{more}; replace or remove {len(failed):,} of {len(sources):,} images, and run "
            "the command again: it continues"
        )


def _records(root: Path, sources: Sequence[Fingerprinted]) -> Iterator[bytes | UserError]:
    """Yield the record of each image, or why it cannot be read, in order."""

    def read(source: Fingerprinted) -> bytes | UserError:
        path, fingerprint = source
        try:
            image, digest = read_as(root / path, to_jpeg)
        except UserError as error:
            return error
        return Record(image, bytes.fromhex(digest), fingerprint).to_bytes()

    # Threads suffice: Pillow releases the interpreter lock while it decodes, scales and encodes.
    threads = available_cores()
    with quiet_pillow(), ThreadPoolExecutor(threads) as pool:
        yield from _map_ahead(pool, read, sources, most=_AHEAD * threads)


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
