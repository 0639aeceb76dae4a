"""SHA-256 digests of the files of a folder, cached so that a later start reads only new files.

The cache is in the cache folder of the user. The folder of the images may be read-only, or belong
to another user, who could store digests of files that were never read.

A file counts as unchanged if its size, its inode and both of its times are the same. The system
sets the time of the last change (ctime) at every write, and no user can set it back, so a file
with a forged modification time is read again (except on FAT, which has no ctime). A corrupt or
foreign cache is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sskd.errors import UserError
from sskd.files import cache_folder, open_bounded, write_atomically

FORMAT = 1  # of the cache; changes with the meaning of an entry
MAX_CACHE_BYTES = 2**29  # more than two million files

# Two writes within one tick of the file system's clock leave the same times. So a file that changed
# in the last seconds is not cached. FAT has the longest tick.
SETTLE_SECONDS = 2.0

# The size, inode, modification time and change time (ns) of a file, and its digest.
Entry = list[Any]


def file_digests(
    root: Path,
    paths: Sequence[str],
    max_bytes: int,
    to_error: Callable[[Path, Exception], UserError],
) -> list[str]:
    """Return the SHA-256 of each of the files ``paths``, relative to ``root``.

    Args:
        max_bytes: the size limit of a file.
        to_error: returns the error to raise for a file that cannot be read.
    """
    started = time.time_ns()
    cache = _cache_path(root)
    known = _read_cache(cache) if cache else {}
    changed = [path for path in paths if not _is_unchanged(root, path, known.get(path))]

    def read(path: str) -> Entry:
        try:
            return _read_entry(root / path, max_bytes)
        except (OSError, ValueError) as error:
            raise to_error(root / path, error) from error

    with ThreadPoolExecutor() as pool:
        entries = pool.map(read, changed)
        disable = None if changed else True  # None: show it on a terminal only
        progress = tqdm(entries, f"{root}: digests", len(changed), unit="image", disable=disable)
        found = known | dict(zip(changed, progress, strict=True))
    if changed and cache:
        latest = started - SETTLE_SECONDS * 1e9
        _write_cache(cache, {path: found[path] for path in paths if max(found[path][2:4]) < latest})
    return [found[path][-1] for path in paths]


def digest_line(path: str, digest: str) -> bytes:
    """Return the line of an image in the digest of its folder."""
    return os.fsencode(path) + b"\0" + digest.encode() + b"\n"


def _read_entry(path: Path, max_bytes: int) -> Entry:
    with open_bounded(path, max_bytes, follow=True) as (stream, status):
        content = stream.read(status.st_size)
    return [*_stamp(status), hashlib.sha256(content).hexdigest()]


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _is_unchanged(root: Path, path: str, entry: Entry | None) -> bool:
    try:
        # For many thousand files, a Path for each of them takes three times as long.
        return entry is not None and entry[:-1] == _stamp(os.stat(f"{root}/{path}"))  # noqa: PTH116
    except OSError:
        return False  # reading the file will give the error


def _cache_path(root: Path) -> Path | None:
    """Return the cache file for the resolved path of ``root``; None if the user has no home."""
    folder = cache_folder()
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return folder and folder / "digests" / f"{digest[:32]}.json"


def _read_cache(cache: Path) -> dict[str, Entry]:
    """Return the entries in ``cache`` by path; none if the file is corrupt or of another user."""
    try:
        with open_bounded(cache, MAX_CACHE_BYTES, follow=True) as (stream, status):
            is_own = status.st_uid == os.geteuid()
            digest, _, content = stream.read(status.st_size).partition(b"\n")
        if not is_own or hashlib.sha256(content).hexdigest().encode() != digest:
            return {}
        cached = json.loads(content)
        return dict(cached["files"]) if cached["format"] == FORMAT else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}


def _write_cache(cache: Path, entries: Mapping[str, Entry]) -> None:
    """Write ``entries`` atomically; of two processes, the later one overwrites the other.

    An error is ignored, because the cache only saves time: the disk may be full or read-only.
    """
    content = json.dumps({"format": FORMAT, "files": entries}).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    with suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(cache, lambda stream: stream.write(digest + b"\n" + content))
