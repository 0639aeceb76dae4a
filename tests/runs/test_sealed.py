"""Torch files that carry their own digest: what is told apart, and what is not called damage."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sskd.runs.checkpoint_file
from sskd.runs.checkpoint_file import (
    CorruptFileError,
    checksum_comment,
    load_checkpoint,
    save_checkpoint,
)


class Foreign:
    """What no checkpoint holds."""


def sealed(content: object) -> bytes:
    """Return the bytes of a sealed file of any ``content``."""
    archive = io.BytesIO()
    torch.save(content, archive)
    return archive.getvalue()[:-2] + checksum_comment(archive.getvalue())


def bomb() -> bytes:
    """Return a sealed file of 100 KB that would unpack to 100 MB."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", bytes(10**8))
    return archive.getvalue()[:-2] + checksum_comment(archive.getvalue())


def calling_a_long_text() -> bytes:
    """Return a sealed file that wants to call a text of 20,000 signs."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        text = b"x" * 20_000
        file.writestr("a/data.pkl", b"\x80\x02X" + len(text).to_bytes(4, "little") + text + b")R.")
    return archive.getvalue()[:-2] + checksum_comment(archive.getvalue())


def test_what_was_written_is_read_by_every_reader_of_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.arange(3.0), "epoch": 2})
    for content in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert content["epoch"] == 2
        assert torch.equal(content["weights"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: sealed({"a": Foreign()}), r"cannot be read \(UnpicklingError\)"),
        (lambda: sealed([1]), "is not a run's"),
        (calling_a_long_text, "a string of 20000 characters and calls an object"),
        (bomb, "would unpack to 95 MiB"),
        (lambda: sealed({"a": 1})[:-1] + b"?", "its checksum differs"),
        (lambda: sealed({"a": 1})[:300], "its end is missing"),
    ],
)
def test_what_is_no_runs_is_named(tmp_path: Path, make: Callable[[], bytes], how: str) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(make())
    with pytest.raises(CorruptFileError, match=rf"^last\.pt is damaged: .*{how}"):
        load_checkpoint(path)


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    if isinstance(error, OSError):
        monkeypatch.setattr(sskd.runs.checkpoint_file, "open_bounded", fail)
    with pytest.raises(OSError, match=r"Cannot allocate memory: .*last\.pt|Input/output error"):
        load_checkpoint(path)


def test_a_large_file_is_in_memory_once(tmp_path: Path) -> None:
    """And the tensors that are made of it, which are not Python's memory."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"state": [torch.zeros(2**15) for _ in range(200)]})
    load_checkpoint(path)  # what torch imports on the way
    tracemalloc.start()
    load_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * path.stat().st_size
