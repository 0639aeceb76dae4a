"""Published files of a dataset: checked by their digests, downloaded if missing, cached as tensors.

The first load writes a cache beside the published files, which later loads read.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from sskd.data.cache import read_cache, write_cache
from sskd.data.reading import Source, abbreviate, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError, one_line
from sskd.files import read_bounded

DOWNLOAD_TIMEOUT = 30.0  # seconds without any data
MAX_BYTES = 2**28  # of a file; the largest published one has 221 MB


@dataclass(frozen=True)
class PublishedFiles:
    """The files of a dataset as its authors published them.

    Attributes:
        name: of the dataset, in messages.
        folder: below ``dataset.root``; empty if the files are in the root itself.
        digests: the MD5 digest of each file by its name.
        url: where they are published, in messages.
        fetch: takes the root and a temporary folder. It downloads the files into ``folder`` below
            the temporary folder; an archive that contains them is downloaded into the root.
        parse: turns the contents of the files, by name, into the dataset.
        cache: the name of the cache in the root.
    """

    name: str
    folder: str
    digests: Mapping[str, str]
    url: str
    fetch: Callable[[Path, Path], None]
    parse: Callable[[dict[str, bytes]], Source]
    cache: str

    @property
    def _key(self) -> str:
        """The start of the names of the files that belong to a download."""
        return self.folder or self.name.lower()

    def load(self, settings: DatasetSettings) -> Source:
        """Return the dataset in the root of ``settings``, which is downloaded if it may be.

        Raises:
            UserError: files are missing or differ from the published ones.
        """
        root = absolute_path(settings.root)
        source = read_cache(root / self.cache, self.digests)
        if source is None:
            source = self._read(root, settings.download)
            write_cache(root / self.cache, self.digests, source)
        return source

    def refuse_missing(self, settings: DatasetSettings) -> None:
        """Raise UserError if there are no files to load and no download is allowed."""
        root = absolute_path(settings.root)
        missing = [name for name in self.digests if not (root / self.folder / name).exists()]
        if missing and not settings.download and not (root / self.cache).exists():
            raise self._missing_error(root, missing)

    def _read(self, root: Path, download: bool) -> Source:
        files = self._read_files(root)
        if download and (files.missing or files.differing):
            files = self._download_once(root)
        if files.differing:
            raise UserError(
                f"{root / self.folder / files.differing[0]} differs from the published file "
                "(another MD5 digest); it may be truncated; move it away and run the command again "
                "with dataset.download=true, or set dataset.root=FOLDER to a complete copy"
            )
        if files.missing:
            raise self._missing_error(root, files.missing)
        # Only bytes with the published digest are parsed: they may be pickles.
        return self.parse(files.intact)

    def _missing_error(self, root: Path, names: list[str]) -> UserError:
        return UserError(
            f"{self.name} is not in {root}: {root / self.folder} has no {abbreviate(names)}; "
            f"set dataset.root=FOLDER to a folder that holds {self._content}, or use "
            "dataset.download=true on a machine with internet access"
        )

    @property
    def _content(self) -> str:
        return self.folder or " and ".join(self.digests)

    def _read_files(self, root: Path) -> Files:
        files = Files({}, [], [])
        for name, md5 in self.digests.items():
            path = root / self.folder / name
            try:
                content = read_bounded(path, MAX_BYTES, follow=True)
            except FileNotFoundError:
                files.missing.append(name)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {one_line(error)}") from error
            except ValueError:  # not a regular file, or too large
                files.differing.append(name)
            else:
                if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                    files.intact[name] = content
                else:
                    files.differing.append(name)
        return files

    def _download_once(self, root: Path) -> Files:
        """Download missing files, one process at a time; existing files are not overwritten."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{self._key}.lock"), _socket_timeout(DOWNLOAD_TIMEOUT):
                # Another process may have downloaded the files while this one waited.
                files = self._read_files(root)
                if files.missing and not files.differing:
                    self._download(root, files.missing)
                    files = self._read_files(root)
        except (OSError, RuntimeError, HTTPException) as error:
            raise UserError(
                f"{self.name} could not be downloaded from {self.url} to {root}: "
                f"{one_line(error)}; set dataset.root=FOLDER to a folder that holds "
                f"{self._content}"
            ) from error
        return files

    def _download(self, root: Path, names: list[str]) -> None:
        """Download ``names`` into ``root``; a killed process leaves no partial file there."""
        part, folder = root / f".{self._key}.part", root / self.folder
        self.fetch(root, part)
        folder.mkdir(exist_ok=True)
        for name in names:
            (part / self.folder / name).replace(folder / name)
        shutil.rmtree(part)


class Files(NamedTuple):
    """The contents of the files with the published digest, and the names of the others."""

    intact: dict[str, bytes]
    missing: list[str]
    differing: list[str]


def refuse_other_size(settings: DatasetSettings, name: str, size: int) -> None:
    """Raise UserError if ``settings`` ask for another size than that of the dataset ``name``."""
    if settings.size != size:
        raise UserError(
            f"dataset.size={settings.size}: {name}'s images have {size} pixels on each side; "
            f"set dataset.size={size}"
        )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Give new sockets a timeout of ``seconds``; torchvision sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
