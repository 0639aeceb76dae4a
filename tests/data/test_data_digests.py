"""The cache of the digests of a folder's files."""

# ruff: noqa: F811 (fixtures of another file)

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from omegaconf import OmegaConf
from test_data_folder import settings
from test_data_identity import digest, photos, reads  # noqa: F401

import sskd.data.digests
from sskd.commands.sweep import Job, Sweep
from sskd.data import SOURCES, DatasetSettings, load_images
from sskd.errors import UserError
from sskd.runs.identity import full_config
from sskd.runs.result import RunResult
from sskd.runs.status import SWEEP_VARIABLE


def cache_file(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").rglob("*.json")
    return path


def test_a_second_start_reads_only_new_files(photos: Path, reads: list[str]) -> None:
    before = digest(photos)
    assert len(reads) == 8
    reads.clear()
    assert digest(photos) == before
    assert reads == []
    shutil.copy(photos / "test/dark/0.bmp", photos / "test/dark/new.bmp")
    os.utime(photos / "test/light/1.bmp")
    digest(photos)
    assert sorted(reads) == ["1.bmp", "new.bmp"]
    reads.clear()
    (photos / "test/dark/new.bmp").unlink()
    assert digest(photos) == before
    assert reads == []


def test_a_file_that_changed_just_now_is_not_cached(
    photos: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sskd.data.digests, "SETTLE_SECONDS", 60.0)
    digest(photos)
    reads.clear()
    digest(photos)
    assert len(reads) == 8


def test_nothing_is_written_beside_the_images(photos: Path, reads: list[str]) -> None:
    before = sorted(photos.rglob("*"))
    digest(photos)
    load_images(settings(photos))
    assert sorted(photos.rglob("*")) == before


def with_checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def other_digests(content: bytes) -> bytes:
    cached = json.loads(content.partition(b"\n")[2])
    for entry in cached["files"].values():
        entry[-1] = "0" * 64
    return content.partition(b"\n")[0] + b"\n" + json.dumps(cached).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content.replace(b"bmp", b"bmq", 1),
        lambda content: b"\xff\x00" * 1000,
        lambda content: b"[" * 100_000,
        lambda content: with_checksum(b"[" * 100_000),
        lambda content: with_checksum(b"[]"),
        lambda content: with_checksum(b'{"format": 0, "files": {}}'),
        lambda content: with_checksum(b'{"format": 1, "files": [1]}'),
        other_digests,
    ],
)
def test_a_corrupt_or_foreign_cache_is_replaced(
    photos: Path, reads: list[str], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    before = digest(photos)
    path = cache_file(tmp_path)
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert path.read_bytes() != intact
    assert digest(photos) == before
    assert path.read_bytes() == intact


def make_sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(60 * 2**30)


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, make_sparse])
def test_a_cache_that_is_not_a_file_is_ignored(
    photos: Path, reads: list[str], tmp_path: Path, put: Callable[[Path], object]
) -> None:
    before = digest(photos)
    path = cache_file(tmp_path)
    path.unlink()
    put(path)
    assert digest(photos) == before


def test_the_cache_of_another_user_is_ignored(
    photos: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    digest(photos)
    reads.clear()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    digest(photos)
    assert len(reads) == 8


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_cache_that_cannot_be_written_is_skipped(
    photos: Path,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: int,
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(error, os.strerror(error))

    before = digest(photos)
    monkeypatch.setattr("sskd.files.os.fsync", refuse)
    os.utime(photos / "test/light/1.bmp")
    assert digest(photos) == before
    assert capfd.readouterr() == ("", "")


def test_a_home_that_is_not_a_folder_is_accepted(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = digest(photos)
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", tmp_path / "absent" / "\udce9", "relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert digest(photos) == before
    assert not Path("relative").exists()


def test_a_user_without_a_home_has_no_cache(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    before = digest(photos)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", expanduser)
    assert sskd.data.digests.file_digests(
        photos, ["train/dark/0.bmp"], 10**6, lambda *_: UserError()
    )
    monkeypatch.undo()
    assert digest(photos) == before


def test_parallel_processes_compute_the_same_digest(
    photos: Path, reads: list[str], tmp_path: Path
) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = set(pool.map(digest, [photos] * 8))
    assert found == {digest(photos)}
    assert reads == [], "their cache is complete"
    assert [path.suffix for path in cache_file(tmp_path).parent.iterdir()] == [".json"]


class Finished(Job):
    """A finished job; it needs the digest of its images to find that out."""

    def finished(self) -> RunResult | None:
        return RunResult() if all(full_config(self.config) for _ in range(2)) else None


def test_a_sweep_computes_a_digest_once(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    computed: list[float] = []

    def digest(settings: DatasetSettings) -> str:
        computed.append(settings.fraction)
        return "digest"

    reader = SOURCES["digits"]._replace(digest=digest)
    monkeypatch.setitem(SOURCES, "digits", reader)
    words = ["dataset=digits", "method=vanilla"]
    monkeypatch.setenv(SWEEP_VARIABLE, "")
    configs = [composed(*words, f"seed={seed}") for seed in range(3)]
    configs.append(composed(*words, "dataset.fraction=0.5"))
    sweep = Sweep([], compose=lambda _: OmegaConf.create())
    sweep.jobs = [Finished([], "", config, tmp_path / "run") for config in configs]
    assert sweep.queue() == []
    assert computed == [1.0, 0.5]
    full_config(configs[0])  # as a job does when it starts
    assert computed == [1.0, 0.5, 1.0]
