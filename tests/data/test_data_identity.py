"""The digest of a folder, which is part of the identity of a run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Compose
from PIL import Image
from test_data_folder import settings

import sskd.data
import sskd.data.decode
import sskd.data.digests
import sskd.train
from sskd.data import load_images
from sskd.data.sources import folder_digest
from sskd.errors import UserError
from sskd.evaluate.__main__ import main as evaluate
from sskd.runs.result import RunResult
from sskd.teachers.find import run_location
from sskd.train import train

TINY = ("dataset=folder", "schedule.epochs=1", "arch@student=resnet8")


def make_photos(root: Path, suffix: str = "bmp", shade: int = 0) -> Path:
    """Make two classes with two images in each part; all files of a format have the same size."""
    options: dict[str, Any] = {"compress_level": 0} if suffix == "png" else {}
    for part in ("train", "test"):
        for number, label in enumerate(("dark", "light")):
            folder = root / part / label
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(2):
                grey = shade + 100 * number + 10 * k
                Image.new("RGB", (32, 32), (grey,) * 3).save(folder / f"{k}.{suffix}", **options)
    return root


def digest(root: Path) -> str:
    return folder_digest(settings(root))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Collect the names of the files that are read for a digest; recent files are cached too."""
    monkeypatch.setattr(sskd.data.digests, "SETTLE_SECONDS", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read, names = sskd.data.digests._read_entry, []

    def counted(path: Path, max_bytes: int) -> Any:
        names.append(path.name)
        return read(path, max_bytes)

    monkeypatch.setattr(sskd.data.digests, "_read_entry", counted)
    return names


# ---- changes of a folder ----


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "pgm", "tif", "png"])
def test_other_pixels_have_another_digest(tmp_path: Path, suffix: str) -> None:
    one, other = make_photos(tmp_path / "a", suffix), make_photos(tmp_path / "b", suffix, shade=1)
    size = {path.stat().st_size for path in tmp_path.rglob(f"*.{suffix}")}
    assert len(size) == 1, "the sizes must not differ"
    assert digest(one) != digest(other)
    assert digest(one) == digest(make_photos(tmp_path / "c", suffix))


def exchange(photos: Path) -> None:
    a, b = photos / "train/dark/0.bmp", photos / "train/light/0.bmp"
    a.rename(photos / "x")
    b.rename(a)
    (photos / "x").rename(b)


def change_pixel(photos: Path) -> None:
    path = photos / "train/light/1.bmp"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_pixel_and_its_time(photos: Path) -> None:
    path = photos / "train/light/1.bmp"
    before = path.stat()
    change_pixel(photos)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "a pixel": change_pixel,
    "a pixel, with the old time": change_pixel_and_its_time,
    "two files exchanged": exchange,
    "one file more": lambda root: shutil.copy(root / "test/dark/0.bmp", root / "test/dark/2.bmp"),
    "one file less": lambda root: (root / "test/dark/0.bmp").unlink(),
    "another name": lambda root: (root / "test/dark/0.bmp").rename(root / "test/dark/9.bmp"),
    "another class": lambda root: (root / "train/dark/0.bmp").rename(root / "train/light/9.bmp"),
    "another part": lambda root: (root / "train/dark/0.bmp").rename(root / "test/dark/9.bmp"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_gives_another_digest(photos: Path, reads: list[str], kind: str) -> None:
    before = digest(photos)
    assert digest(photos) == before
    CHANGES[kind](photos)
    assert digest(photos) != before


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_before_the_load_is_noticed(photos: Path, kind: str) -> None:
    before = digest(photos)
    assert load_images(settings(photos), before).digest == before
    CHANGES[kind](photos)
    with pytest.raises(UserError, match="its files changed while the command started") as caught:
        load_images(settings(photos), before)
    assert "\n" not in str(caught.value)
    assert str(photos) in str(caught.value)


def test_the_digest_is_of_the_decoded_bytes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes only during the load is noticed too."""
    before, read = digest(photos), sskd.data.decode.read_bounded

    def changed(path: Path, max_bytes: int, **options: bool) -> bytes:
        content = read(path, max_bytes, **options)
        return content[:-1] + bytes([content[-1] ^ 1])

    monkeypatch.setattr(sskd.data.decode, "read_bounded", changed)
    with pytest.raises(UserError, match="its files changed"):
        load_images(settings(photos), before)
    assert digest(photos) == before


def test_a_digest_is_computed_again_after_loading(
    monkeypatch: pytest.MonkeyPatch, composed: Compose
) -> None:
    answers = iter(["before", "after", "before", "before"])
    reader = sskd.data.SOURCES["digits"]._replace(digest=lambda _: next(answers))
    monkeypatch.setitem(sskd.data.SOURCES, "digits", reader)
    config = composed("dataset=digits", "method=vanilla")
    with pytest.raises(UserError, match="its files changed"):
        load_images(config.dataset, reader.digest(config.dataset))
    assert load_images(config.dataset, reader.digest(config.dataset)).digest == "before"


# ---- runs ----


def test_a_finished_run_with_other_pixels_is_refused(
    composed: Compose, photos: Path, tmp_path: Path
) -> None:
    config = composed(*TINY, "method=vanilla", f"dataset.root={photos}")
    train(config)
    student = composed(
        *TINY, "method=kd", "arch@teacher=resnet8", f"dataset.root={photos}", "dataset.seed=0"
    )
    train(student)
    make_photos(photos, shade=1)
    with pytest.raises(UserError, match=r"run of another configuration: dataset\.digest"):
        train(config)
    with pytest.raises(UserError, match=r"teacher of another configuration: dataset\.digest"):
        train(student)


def test_a_change_while_a_run_starts_is_an_error(
    composed: Compose, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*TINY, "method=vanilla", f"dataset.root={photos}")
    monkeypatch.setattr("sskd.train.reset_peak_memory", lambda _: change_pixel(photos))
    with pytest.raises(UserError, match="its files changed"):
        train(config)
    assert not (run_location(config)[0] / "result.json").exists()


def test_a_phase_has_the_digest_of_the_loaded_images(
    composed: Compose, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change after the load must not give the phase the digest of the changed folder."""
    words = (*TINY, f"dataset.root={photos}", "arch@teacher=resnet8", "teacher.train=true")
    train(composed(*TINY, "method=vanilla", f"dataset.root={photos}"))
    before = digest(photos)
    share = sskd.train.find_or_train_phase

    def changed(*args: Any) -> Any:
        change_pixel(photos)
        return share(*args)

    monkeypatch.setattr("sskd.train.find_or_train_phase", changed)
    config = composed(*words, "method=sskd")
    train(config)
    (phase,) = Path(config.runs, "photos/phases").rglob("config.yaml")
    assert f"digest: {before}" in phase.read_text()


def test_an_evaluation_warns_of_changed_images(
    composed: Compose, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*TINY, "method=vanilla", f"dataset.root={photos}")
    train(config)
    folder = str(run_location(config)[0])
    for warnings in (0, 1):
        capsys.readouterr()
        assert evaluate([folder, "--device", "cpu", "--repeats", "0"]) == 0
        out, err = capsys.readouterr()
        assert "top-1" in out
        assert err.count("another dataset.digest") == err.count("\n") == warnings
        change_pixel(photos)


# ---- runs of earlier versions, which recorded names and sizes ----


def names_and_sizes(root: Path) -> str:
    """Return the digest of those versions: one line for each file, sorted by path."""
    digest = hashlib.sha256()
    files = [path for part in ("train", "test") for path in (root / part).rglob("*")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


@pytest.fixture
def earlier_run(composed: Compose, photos: Path) -> Callable[..., RunResult]:
    """Make a run of those versions; return a function that starts the same command again."""
    config = composed(*TINY, "method=vanilla", f"dataset.root={photos}")
    (photos / "train/dark/Thumbs.db").write_text("counted by those versions")
    train(config)
    path = run_location(config)[0] / "config.yaml"
    path.write_text(path.read_text().replace(digest(photos), names_and_sizes(photos)))
    assert names_and_sizes(photos) in path.read_text()
    return lambda *more: train(
        composed(*TINY, f"dataset.root={photos}", *(more or ("method=vanilla",)))
    )


def test_an_earlier_run_is_accepted_with_a_warning(
    earlier_run: Callable[..., RunResult], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    earlier_run()
    out, err = capsys.readouterr()
    assert "already finished" in out
    assert err.count("\n") == 1
    assert "warning: the run of resnet8 (vanilla, seed 0)" in err
    assert str(photos) in err
    earlier_run("method=kd", "arch@teacher=resnet8")  # it can be a teacher too


def test_an_earlier_run_resumes_with_a_warning(
    composed: Compose,
    earlier_run: Callable[..., RunResult],
    photos: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = run_location(composed(*TINY, "method=vanilla", f"dataset.root={photos}"))[0]
    (folder / "result.json").unlink()
    capsys.readouterr()
    earlier_run()
    assert "was made by a version that recorded only names and sizes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        CHANGES["one file more"],
        CHANGES["another name"],
        lambda root: (root / "train/dark/Thumbs.db").unlink(),
    ],
)
def test_an_earlier_run_with_other_files_is_refused(
    earlier_run: Callable[..., RunResult], photos: Path, change: Callable[[Path], object]
) -> None:
    change(photos)
    for more in ((), ("method=kd", "arch@teacher=resnet8")):
        with pytest.raises(UserError, match=r"of another configuration: dataset\.digest"):
            earlier_run(*more)


@pytest.mark.parametrize(
    "hidden", ["train/dark/.ipynb_checkpoints", "train/dark/@eaDir", "test/.x"]
)
def test_an_earlier_run_with_hidden_images_is_refused(
    composed: Compose, photos: Path, hidden: str
) -> None:
    """It trained on images, or even classes, that are skipped now."""
    config = composed(*TINY, "method=vanilla", f"dataset.root={photos}")
    train(config)
    path = run_location(config)[0] / "config.yaml"
    (photos / hidden).mkdir()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(photos / hidden / "0.png")
    path.write_text(path.read_text().replace(digest(photos), names_and_sizes(photos)))
    with pytest.raises(UserError, match=r"of another configuration: dataset\.digest"):
        train(config)
