"""CIFAR: what is read, what is refused, and what is downloaded."""

from __future__ import annotations

import hashlib
import os
import pickle
import socket
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchvision.datasets import CIFAR10, CIFAR100, cifar

from sskd.data import DatasetSettings, Images, load_images
from sskd.errors import UserError

CONF = Path(__file__).parent.parent / "conf" / "dataset"
REAL = os.environ.get("SSKD_DATA")


def settings(name: str, **changes: Any) -> DatasetSettings:
    """The settings of the real YAML, with changes."""
    return DatasetSettings(**{**yaml.safe_load((CONF / f"{name}.yaml").read_text()), **changes})


def refused(name: str, **changes: Any) -> str:
    """Return the one line with which the settings are refused."""
    with pytest.raises(UserError) as caught:
        load_images(settings(name, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_cifar(folder: Path) -> dict[str, str]:
    """Write a small CIFAR-100 in the published layout; return each file's MD5 digest."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content: dict[str, Any] = {
        name: {
            "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [k % 2 for k in range(count)],
        }
        for name, count in (("train", 6), ("test", 4))
    }
    content["meta"] = {"fine_label_names": ["apple", "baby"]}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
    return {
        name: hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()
        for name in content
    }


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a small CIFAR-100 whose digests torchvision takes for the published ones."""
    digests = write_cifar(tmp_path / "root" / "cifar-100-python")
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digests["meta"]})
    return tmp_path / "root"


def no_download(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing may be downloaded here")


def test_cifar_is_read_pixel_by_pixel(small_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_download)
    images = load_images(settings("cifar100", root=str(small_cifar)))
    raw = pickle.loads((small_cifar / "cifar-100-python" / "train").read_bytes())
    assert images.train.images.flatten(1).numpy().tolist() == raw["data"].tolist()
    assert images.train.labels.tolist() == raw["fine_labels"]
    assert images.train.labels.dtype == torch.int64
    assert (len(images.test), images.classes) == (4, ("apple", "baby"))
    assert images.mean == (0.5071, 0.4866, 0.4409)


@pytest.mark.parametrize("name", ["cifar100", "cifar10"])
def test_missing_files_are_told_with_the_place_and_the_way(name: str, tmp_path: Path) -> None:
    for root in (tmp_path / "absent", tmp_path):
        message = refused(name, root=str(root), download=False)
        assert str(root) in message
        assert "dataset.root=FOLDER" in message
        assert "dataset.download=true" in message
    assert not (tmp_path / "absent").exists()


def test_the_place_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "somewhere") in refused("cifar100", root="somewhere", download=False)


@pytest.mark.parametrize("broken", ["train", "test", "meta"])
@pytest.mark.parametrize("download", [False, True])
def test_a_file_cut_short_is_named_and_left_alone(
    broken: str, download: bool, small_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "download_and_extract_archive", no_download)
    path = small_cifar / "cifar-100-python" / broken
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    message = refused("cifar100", root=str(small_cifar), download=download)
    assert str(path) in message
    assert "published" in message
    assert "move it away" in message
    assert path.read_bytes() == before


def test_nothing_that_is_not_of_the_published_digest_is_unpickled(small_cifar: Path) -> None:
    marker = small_cifar / "was-unpickled"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    hostile = pickle.dumps(Hostile())
    for name in ("train", "test", "meta"):
        path = small_cifar / "cifar-100-python" / name
        whole = path.read_bytes()
        path.write_bytes(hostile)
        assert name in refused("cifar100", root=str(small_cifar), download=False)
        # torchvision alone must refuse it as well: it is what opens the file.
        with pytest.raises(RuntimeError, match="not found or corrupted"):
            CIFAR100(small_cifar, train=name != "test")
        path.write_bytes(whole)
    assert not marker.exists()
    pickle.loads(hostile)
    assert marker.exists(), "the file would have done it"


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no such host"),
        TimeoutError("timed out"),
        RuntimeError("File not found or corrupted."),
    ],
)
def test_a_failed_download_is_one_line(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert socket.getdefaulttimeout() == 30
        raise failure

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    message = refused("cifar10", root=str(tmp_path / "new"), download=True)
    assert CIFAR10.url in message
    assert str(tmp_path / "new") in message
    assert str(failure) in message
    assert "dataset.root=FOLDER" in message
    assert socket.getdefaulttimeout() is None


def test_a_root_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused("cifar10", root=str(tmp_path / "file" / "below"), download=True)
    assert str(tmp_path / "file" / "below") in message


def test_two_loads_at_once_download_once(
    small_cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []

    def download(url: str, root: str, **kwargs: Any) -> None:
        downloads.append(url)
        target = Path(root) / "cifar-100-python"
        target.mkdir()
        for file in (small_cifar / "cifar-100-python").iterdir():
            (target / file.name).write_bytes(file.read_bytes()[:10])
            time.sleep(0.1)
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    loaded: list[Images] = []

    def load() -> None:
        loaded.append(load_images(settings("cifar100", root=str(tmp_path / "new"))))

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.15)
    for thread in threads:
        thread.join()
    assert downloads == [CIFAR100.url]
    assert [len(images.train) for images in loaded] == [6, 6]
    assert socket.getdefaulttimeout() is None


def test_another_size_of_cifar_is_refused() -> None:
    assert "dataset.size=32" in refused("cifar100", size=64)


@pytest.fixture(scope="module")
def real_cifar100() -> Images:
    if REAL is None:
        pytest.skip("SSKD_DATA names no folder that holds cifar-100-python")
    return load_images(settings("cifar100", root=REAL, download=False, mean=None, std=None))


def test_cifar100_has_its_published_size(real_cifar100: Images) -> None:
    assert real_cifar100.train.images.shape == (50000, 3, 32, 32)
    assert real_cifar100.test.images.shape == (10000, 3, 32, 32)
    assert torch.bincount(real_cifar100.train.labels).tolist() == [500] * 100
    assert torch.bincount(real_cifar100.test.labels).tolist() == [100] * 100
    assert (real_cifar100.num_classes, real_cifar100.image_size) == (100, 32)
    assert real_cifar100.classes[:2] == ("apple", "aquarium_fish")


def test_cifar100_is_torchvisions_pixel_by_pixel(real_cifar100: Images) -> None:
    assert REAL is not None
    theirs = CIFAR100(REAL, train=False)
    for position in range(0, 10000, 97):
        image, label = theirs[position]
        ours = real_cifar100.test.images[position].permute(1, 2, 0).numpy()
        assert (ours == np.asarray(image)).all()
        assert real_cifar100.test.labels[position] == label


def test_cifar100s_own_statistics_are_near_those_of_the_published_recipe(
    real_cifar100: Images,
) -> None:
    recipe = settings("cifar100")
    assert real_cifar100.mean == pytest.approx(recipe.mean, abs=1e-4)
    assert real_cifar100.std == pytest.approx(recipe.std, abs=3e-4)
