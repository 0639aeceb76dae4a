"""Files that are written atomically."""

from __future__ import annotations

import errno
import os
import stat
from operator import methodcaller
from pathlib import Path
from typing import BinaryIO

import pytest

from sskd.files import make_durable_folder, stale_temporaries, write_atomically, write_text


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_text(path, "old")

    def fail(stream: BinaryIO) -> None:
        stream.write(b"new" * 10_000)
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left") as error:
        write_atomically(path, fail)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_only_temporary_files_are_stale(tmp_path: Path) -> None:
    for name in (".last.pt.123.part", "last.pt", ".lock", "views.part"):
        (tmp_path / name).write_text("")
    assert [path.name for path in stale_temporaries(tmp_path)] == [".last.pt.123.part"]


def test_the_old_content_can_be_kept(tmp_path: Path) -> None:
    path, kept = tmp_path / "last.pt", tmp_path / "previous.pt"
    for content in (b"one", b"two", b"three"):
        write_atomically(path, methodcaller("write", content), keep=kept)
    assert (path.read_text(), kept.read_text()) == ("three", "two")


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Otherwise a power failure could leave an empty file in the place of the old one."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    steps: list[tuple[str, int, int]] = []
    sync, rename = os.fsync, Path.replace

    def recorded(descriptor: int) -> None:
        status = os.fstat(descriptor)
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "file"
        steps.append((kind, status.st_ino, 0 if kind == "folder" else status.st_size))
        sync(descriptor)

    def replace(source: Path, target: Path) -> Path:
        if target == path:
            steps.append(("name", source.stat().st_ino, 0))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(
        path, methodcaller("write", b"new"), keep=tmp_path / "previous.pt" if keep else None
    )
    number = path.stat().st_ino
    assert steps == [
        ("file", number, 3),
        ("name", number, 0),
        ("folder", tmp_path.stat().st_ino, 0),
    ]


def test_a_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    for _ in range(2):
        make_durable_folder(tmp_path / "a" / "b" / "c")
        assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_durable_folder(tmp_path / "file" / "d")
