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


def with_changed_weight() -> bytes:
    """Return a torch file in which one byte of a tensor is another."""
    data = bytearray(saved({"weights": torch.full((64,), 0.7)}))
    data[data.index(torch.full((64,), 0.7).numpy().tobytes())] ^= 1
    return bytes(data)


def bomb() -> bytes:
    """Return a file of 100 KB that would unpack to 100 MB."""
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


def test_every_reader_of_torch_files_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.arange(3.0), "epoch": 2})
    for content in (load_checkpoint(path), torch.load(path, weights_only=True)):
        assert content["epoch"] == 2
        assert torch.equal(content["weights"], torch.arange(3.0))


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (lambda: saved({"a": Foreign()}), r"cannot be read \(UnpicklingError\)"),
        (lambda: saved([1]), "it is not a run's checkpoint"),
        (calling_a_long_text, "a string of 20000 characters and calls an object"),
        (bomb, "would unpack to 95 MiB"),
        (with_changed_weight, r"the checksum of '\S+/data/0' differs"),
        (lambda: saved({"a": 1})[:300], r"cannot be read \(BadZipFile\)"),
    ],
)
def test_corruption_is_named(tmp_path: Path, make: Callable[[], bytes], how: str) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(make())
    with pytest.raises(CorruptFileError, match=rf"^last\.pt is corrupt: .*{how}"):
        load_checkpoint(path)


def test_no_flipped_bit_changes_the_content(tmp_path: Path) -> None:
    """Each byte in turn: the file is refused, or the content is the same."""
    path = tmp_path / "last.pt"
    weights = torch.arange(3.0)
    whole, refused = saved({"weights": weights, "epoch": 2, "name": "resnet8"}), 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
        except CorruptFileError:
            refused += 1
            continue
        assert torch.equal(found.pop("weights"), weights)
        assert found == {"epoch": 2, "name": "resnet8"}
    assert refused > len(whole) / 4


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


def test_a_large_file_is_in_memory_once(tmp_path: Path) -> None:
    """Apart from the tensors, which are not in Python's memory."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"state": [torch.zeros(2**15) for _ in range(200)]})
    load_checkpoint(path)  # torch imports modules the first time
    tracemalloc.start()
    load_checkpoint(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.3 * path.stat().st_size
