"""Torch files with checksums: which corruption is found, and what is not called corruption."""

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
from sskd.errors import CorruptFileError
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint


class Foreign:
    """A class that no checkpoint contains."""


def saved(content: object) -> bytes:
    """Return the bytes of a torch file of any ``content``."""
    archive = io.BytesIO()
    torch.save(content, archive)
    return archive.getvalue()


def with_flipped_bit() -> bytes:
    """Return a torch file in which one bit of a tensor was flipped."""
    data = bytearray(saved({"weights": torch.full((64,), 0.7)}))
    data[data.index(torch.full((64,), 0.7).numpy().tobytes())] ^= 1
    return bytes(data)


def bomb() -> bytes:
    """Return an archive of 100 KB that would unpack to 100 MB."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb/data.pkl", bytes(10**8))
    return archive.getvalue()


def calling_a_long_text() -> bytes:
    """Return a file whose pickle calls a text of 20,000 characters."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        text = b"x" * 20_000
        file.writestr("a/data.pkl", b"\x80\x02X" + len(text).to_bytes(4, "little") + text + b")R.")
    return archive.getvalue()


def test_torch_reads_a_checkpoint_too(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.arange(3.0), "epoch": 2})
    for content in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert content["epoch"] == 2
        assert torch.equal(content["weights"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: saved({"a": Foreign()}), r"cannot be read \(UnpicklingError\)"),
        (lambda: saved([1]), "it is not a run's checkpoint"),
        (calling_a_long_text, "a string of 20000 characters and calls an object"),
        (bomb, "would unpack to 95 MiB"),
        (with_flipped_bit, r"the checksum of '\S+/data/0' differs"),
        (lambda: saved({"a": 1})[:300], r"cannot be read \(BadZipFile\)"),
    ],
)
def test_the_error_says_how_the_file_is_corrupt(
    tmp_path: Path, make: Callable[[], bytes], message: str
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(make())
    with pytest.raises(CorruptFileError, match=rf"^last\.pt is corrupt: .*{message}"):
        load_checkpoint(path)


def test_no_flipped_bit_changes_the_content(tmp_path: Path) -> None:
    """One bit of each byte in turn is flipped: the file is refused, or has the same content."""
    path = tmp_path / "last.pt"
    weights = torch.arange(3.0)
    original, refused = saved({"weights": weights, "epoch": 2, "name": "resnet8"}), 0
    for position in range(len(original)):
        corrupt = bytearray(original)
        corrupt[position] ^= 1 << position % 8
        path.write_bytes(corrupt)
        try:
            found = load_checkpoint(path)
        except CorruptFileError:
            refused += 1
            continue
        assert torch.equal(found.pop("weights"), weights)
        assert found == {"epoch": 2, "name": "resnet8"}
    assert refused > len(original) / 4


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_an_unreadable_file_is_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"epoch": 2})

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    if isinstance(error, OSError):
        monkeypatch.setattr(sskd.runs.checkpoint_file, "read_bounded", fail)
    with pytest.raises(OSError, match=r"Cannot allocate memory: .*last\.pt|Input/output error"):
        load_checkpoint(path)


def test_loading_keeps_one_copy_of_the_file_in_memory(tmp_path: Path) -> None:
    """Tensors are not counted, since tracemalloc sees only Python's memory."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"state": [torch.zeros(2**15) for _ in range(200)]})
    load_checkpoint(path)  # torch imports modules the first time
    tracemalloc.start()
    load_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * path.stat().st_size
