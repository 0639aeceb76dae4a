"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from sskd.storage import leftovers, write_text, write_whole


def test_a_failed_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_text(path, "old")

    def fail(stream: BinaryIO) -> None:
        stream.write(b"new" * 10_000)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_a_killed_process_left_is_found_and_nothing_else(tmp_path: Path) -> None:
    for name in (".last.pt.123.part", "last.pt", ".lock", "views.part"):
        (tmp_path / name).write_text("")
    assert [path.name for path in leftovers(tmp_path)] == [".last.pt.123.part"]
