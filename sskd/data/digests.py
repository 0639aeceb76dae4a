"""The SHA-256 digests of a folder's files, remembered so that a later start reads only new ones.

The cache lies in the user's own cache folder: the images' folder may be read-only, and may belong
to somebody else, who could then vouch for files that were never read. A file counts as unchanged
if its size, its inode and both its times are the same. The system sets the time of the last change
(ctime) at every write, and nobody can set it back, so that a file is read again if only its
modification time was set back (FAT alone keeps no ctime). A cache that is damaged or foreign is as
good as none.
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
from sskd.files import expanded, open_bounded, write_atomically

FORMAT = 1  # of the cache: another number if an entry means something else
MOST_BYTES = 2**29  # of a cache: more than two million files

# Seconds. Two writes within one tick of the file system's clock leave the same times, so a file
# that changed just now is not remembered. FAT has the longest tick.
SETTLED = 2.0

# A file's size, inode, modification and change (ns), and its digest.
Entry = list[Any]


def digests(
    root: Path, names: Sequence[str], most: int, refusal: Callable[[Path, Exception], UserError]
) -> list[str]:
    """Return the SHA-256 of each of the files ``names`` (paths below ``root``).

    Args:
        most: bytes of a file.
        refusal: returns the error about a file that cannot be read.
    """
    started = time.time_ns()
    cache = _cache_of(root)
    known = _recall(cache) if cache else {}
    changed = [name for name in names if not _is_unchanged(root, name, known.get(name))]

    def read(name: str) -> Entry:
        try:
            return _read(root / name, most)
        except (OSError, ValueError) as error:
            raise refusal(root / name, error) from error

    with ThreadPoolExecutor() as pool:
        entries = pool.map(read, changed)
        shown = None if changed else True  # None: if there is a terminal
        progress = tqdm(entries, f"{root}: digests", len(changed), unit="image", disable=shown)
        found = known | dict(zip(changed, progress, strict=True))
    if changed and cache:
        latest = started - SETTLED * 1e9
        _remember(cache, {name: found[name] for name in names if max(found[name][2:4]) < latest})
    return [found[name][-1] for name in names]


def _read(path: Path, most: int) -> Entry:
    with open_bounded(path, most, follow=True) as (stream, status):
        content = stream.read(status.st_size)
    return [*_stamp(status), hashlib.sha256(content).hexdigest()]


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _is_unchanged(root: Path, name: str, entry: Entry | None) -> bool:
    try:
        # A Path for each of many thousand files takes three times as long.
        return entry is not None and entry[:-1] == _stamp(os.stat(f"{root}/{name}"))  # noqa: PTH116
    except OSError:
        return False  # reading it says what is wrong


def _cache_of(root: Path) -> Path | None:
    """Return the file that remembers the digests of what ``root`` leads to; None without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = named if named.is_absolute() else expanded("~/.cache")
    except UserError:
        return None
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()
    return folder / "sskd" / "digests" / f"{digest[:32]}.json"


def _recall(cache: Path) -> dict[str, Entry]:
    """Return what ``_remember`` wrote to ``cache``, by name; nothing if that is not certain."""
    try:
        with open_bounded(cache, MOST_BYTES, follow=True) as (stream, status):
            own = status.st_uid == os.geteuid()
            digest, _, content = stream.read(status.st_size).partition(b"\n")
        if not own or hashlib.sha256(content).hexdigest().encode() != digest:
            return {}
        kept = json.loads(content)
        return dict(kept["files"]) if kept["format"] == FORMAT else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}


def _remember(cache: Path, entries: Mapping[str, Entry]) -> None:
    """Write ``entries`` whole; of two processes at once the later one's stay.

    Without a cache everything works, only slower: a home folder may be full or read-only.
    """
    content = json.dumps({"format": FORMAT, "files": entries}).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    with suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(cache, lambda stream: stream.write(digest + b"\n" + content))
