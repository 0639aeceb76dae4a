"""STL-10, SVHN and TinyImageNet: small files in the published layouts."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import savemat
from test_data import settings_of
from torchvision.datasets import STL10, SVHN

import sskd.data.stl10
import sskd.data.svhn
from sskd.checks.datasets import check_images, check_repeatable
from sskd.data import SOURCES, DatasetSettings, Images, load_images, refuse_missing
from sskd.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
GENERATOR = np.random.default_rng(0)
STL10_PIXELS = {part: GENERATOR.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
                for part, n in (("train", 5), ("test", 3))}  # fmt: skip
SVHN_PIXELS = {part: GENERATOR.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
               for part, n in (("train", 4), ("test", 3))}  # fmt: skip
LABELS = {"train": [1, 10, 2, 3, 9], "test": [10, 5, 1]}
WNIDS = ("n01443537", "n01629819")


def settings(name: str, root: Path, **changes: Any) -> DatasetSettings:
    """Return the settings in the real YAML file, with changes, and without a download."""
    shown = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return DatasetSettings(**{**shown, "root": str(root), "download": False, **changes})


def load(name: str, root: Path, **changes: Any) -> Images:
    return load_images(settings(name, root, **changes))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_stl10(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, pixels in STL10_PIXELS.items():
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(LABELS[part][: len(pixels)]))
        names = (f"{part}_X.bin", f"{part}_y.bin", *(["unlabeled_X.bin"] * (part == "train")))
        listed = [[name, md5(folder / name) if (folder / name).exists() else ""] for name in names]
        patch.setattr(STL10, f"{part}_list", listed)


def write_svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    root.mkdir(exist_ok=True)
    published = {}
    for part, pixels in SVHN_PIXELS.items():
        path = root / f"{part}_32x32.mat"
        labels = np.array(LABELS[part][: len(pixels)], np.uint8)[:, None]
        savemat(path, {"X": pixels.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)
        published[part] = [f"http://127.0.0.1:9/{path.name}", path.name, md5(path)]
    patch.setattr(SVHN, "split_list", published)


def write_tiny_imagenet(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "tiny-imagenet-200"
    for label, wnid in enumerate(WNIDS):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for number in range(2):
            path = folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
            Image.new("RGB", (64, 64), (100 * label, 200, 40)).save(path)
    (folder / "val" / "images").mkdir(parents=True)
    for number, label in enumerate((1, 0, 1)):
        path = folder / "val" / "images" / f"val_{number}.JPEG"
        Image.new("L", (64, 64), 100 * label).save(path)
    lines = [f"val_{number}.JPEG\t{WNIDS[label]}\t0\t0\t9\t9\n" for number, label in
             enumerate((1, 0, 1))]  # fmt: skip
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


WRITERS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "stl10": write_stl10,
    "svhn": write_svhn,
    "tiny_imagenet": write_tiny_imagenet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_holds_for_every_dataset(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[name](tmp_path, monkeypatch)
    shown = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert shown["source"] == shown["name"] == name
    assert set(shown) == settings_of(name)
    loaded = settings(name, tmp_path)
    refuse_missing(loaded)
    check_repeatable(loaded)
    check_images(loaded, loaded.size)
    if name == "svhn":
        with pytest.raises(UserError, match=r"set dataset\.size=32"):
            check_images(loaded, 64)
    else:
        check_images(loaded, 64)
    assert load_images(loaded).mean is not None


def test_stl10_has_the_pixels_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stl10(tmp_path, monkeypatch)
    images = load("stl10", tmp_path, size=96)
    monkeypatch.setattr(STL10, "_check_integrity", lambda _: True)
    for part, split in (("train", images.train), ("test", images.test)):
        reference = STL10(str(tmp_path), split=part)
        assert (split.images.numpy() == reference.data).all()
        assert split.labels.tolist() == reference.labels.tolist()
        assert split.labels.dtype == torch.int64
    assert images.classes[9] == "truck"


def test_stl10_is_scaled_as_pillow_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stl10(tmp_path, monkeypatch)
    images = load("stl10", tmp_path).train.images
    assert images.shape == (5, 3, 32, 32)
    for scaled, pixels in zip(images, STL10_PIXELS["train"], strict=True):
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        expected = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
        assert abs(scaled.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert torch.equal(load("stl10", tmp_path).train.images, images), "from the cache"
    assert load("stl10", tmp_path, size=48).image_size == 48


def test_svhn_has_the_pixels_of_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_svhn(tmp_path, monkeypatch)
    images = load("svhn", tmp_path)
    for part, split in (("train", images.train), ("test", images.test)):
        reference = SVHN(str(tmp_path), split=part)
        assert (split.images.numpy() == reference.data).all()
        assert split.labels.tolist() == reference.labels.tolist()
    assert images.test.labels.tolist() == [0, 5, 1]
    with pytest.raises(UserError, match=r"SVHN's images have 32 pixels .* dataset\.size=32"):
        load("svhn", tmp_path, size=64)


def test_tiny_imagenet_has_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_imagenet(tmp_path, monkeypatch)
    images = load("tiny_imagenet", tmp_path)
    assert images.classes == WNIDS
    assert images.train.labels.tolist() == [0, 0, 1, 1]
    assert images.test.labels.tolist() == [1, 0, 1]
    shades = images.test.images[:, 0, 0, 0].tolist()
    assert shades == pytest.approx([100, 0, 100], abs=3)
    before = images.digest
    path = tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG"
    Image.new("RGB", (64, 64)).save(path)
    assert load("tiny_imagenet", tmp_path).digest != before


DAMAGES: dict[str, tuple[str, str, str]] = {
    "no classes": ("tiny-imagenet-200/train", "", "is not complete in"),
    "no validation": ("tiny-imagenet-200/val/images", "", "is not complete in"),
    "no annotations": ("tiny-imagenet-200/val/val_annotations.txt", "", "is not complete in"),
    "a class of its own": ("", "val_0.JPEG\tn09\n", "line 1, names no class"),
    "an empty line": ("", "\n", "line 1, names no class"),
    "a label too few": ("", f"val_0.JPEG\t{WNIDS[0]}\n", "has no label of val/images/val_1.JPEG"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_incomplete_tiny_imagenet_is_one_line(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_imagenet(tmp_path, monkeypatch)
    removed, annotations, message = DAMAGES[damage]
    path = tmp_path / removed
    if annotations:
        (tmp_path / "tiny-imagenet-200/val/val_annotations.txt").write_text(annotations)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    for read in (load_images, refuse_missing):
        with pytest.raises(UserError, match=message) as caught:
            read(settings("tiny_imagenet", tmp_path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stl10", "svhn"])
def test_a_damaged_published_file_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    WRITERS[name](root, monkeypatch)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        intact = path.read_bytes()
        path.write_bytes(intact[:-1])
        with pytest.raises(UserError, match=f"{path} differs from the published file"):
            load(name, root)
        path.unlink()
        for read in (load_images, refuse_missing):
            with pytest.raises(UserError, match=f"has no {path.name}; set dataset.root"):
                read(settings(name, root))
        path.write_bytes(intact)
    assert len(load(name, root).test) == 3


def test_missing_files_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive of STL-10 and the two files of SVHN come from a folder in this test."""
    shelf = tmp_path / "shelf"
    write_stl10(shelf, monkeypatch)
    write_svhn(shelf, monkeypatch)

    def unpack(url: str, root: Path, part: Path, **_: str) -> None:
        shutil.copytree(shelf / "stl10_binary", part / "stl10_binary")

    def fetch(url: str, part: Path, name: str, digest: str) -> None:
        part.mkdir(exist_ok=True)
        shutil.copy(shelf / name, part)

    monkeypatch.setattr(sskd.data.stl10, "download_and_extract_archive", unpack)
    monkeypatch.setattr(sskd.data.svhn, "download_url", fetch)
    root = tmp_path / "new"
    for name in ("stl10", "svhn"):
        assert len(load(name, root, download=True).test) == 3
    names = {path.name for path in root.iterdir() if not path.name.endswith(".lock")}
    assert names == {
        *("stl10_binary", "stl10_binary-32.safetensors"),
        *("svhn.safetensors", "train_32x32.mat", "test_32x32.mat"),
    }


def test_a_published_source_has_no_digest(tmp_path: Path) -> None:
    for name in ("stl10", "svhn"):
        assert SOURCES[name].digest(settings(name, tmp_path)) is None
