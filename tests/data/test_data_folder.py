"""A folder of images by class: the images that are read, and folders that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from sskd.data import DatasetSettings, Images, load_images
from sskd.data.sources import folder_digest
from sskd.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"


def settings(root: Path, size: int = 32) -> DatasetSettings:
    """Return the settings in the real YAML file for the folder ``root``."""
    shown: dict[str, Any] = yaml.safe_load((CONF / "folder.yaml").read_text())
    return DatasetSettings(**{**shown, "root": str(root), "size": size})


def load(root: Path, size: int = 32) -> Images:
    """Load the folder."""
    return load_images(settings(root, size))


def refused(root: Path) -> str:
    """Return the error message for the folder; it is one line."""
    with pytest.raises(UserError) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_folder(root: Path) -> Path:
    """Make a folder of two classes, with images of different modes and sizes."""
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200, 100, 50)).save(root / part / name / "b.png")
    cat = root / "train" / "cat"
    Image.new("L", (70, 50), 90).save(cat / "a_grey.png")
    Image.new("RGBA", (40, 90), (10, 20, 30, 128)).save(cat / "c_alpha.png")
    Image.new("P", (33, 33), 0).save(cat / "d_palette.png", transparency=b"\x00\xff")
    Image.new("CMYK", (64, 64), (0, 0, 0, 0)).save(cat / "e_cmyk.jpg")
    Image.new("1", (8, 8), 1).save(cat / "f_bits.png")
    return root


def test_all_images_become_rgb_of_one_size(tmp_path: Path) -> None:
    images = load(make_folder(tmp_path))
    assert images.classes == ("cat", "dog")
    assert images.train.images.shape == (7, 3, 32, 32)
    assert images.train.labels.tolist() == [0] * 6 + [1]
    assert images.test.labels.tolist() == [0, 1]
    corners = images.train.images[:, :, 0, 0].tolist()
    assert corners[:4] == [[90, 90, 90], [200, 100, 50], [10, 20, 30], [0, 0, 0]]
    assert min(corners[4]) >= 253, "CMYK without ink is white"
    assert corners[5] == [255, 255, 255]


def test_an_image_is_cropped_at_its_centre(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    ImageDraw.Draw(wide).rectangle((32, 0, 95, 63), fill=(0, 0, 255))
    wide.save(root / "test" / "cat" / "b.png")
    image = load(root, size=48).test.images[0]
    assert image.shape == (3, 48, 48)
    assert (image[:, :, 1:-1] == torch.tensor([0, 0, 255])[:, None, None]).all()


def test_a_photograph_is_rotated_upright(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).rectangle((0, 0, 63, 31), fill=(255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 3  # the orientation of a camera held upside down
    picture.save(root / "test" / "cat" / "b.png", exif=exif)
    image = load(root).test.images[0]
    assert image[:, :14].max() == 0
    assert image[:, -14:].min() == 255


def test_a_link_to_a_class_is_followed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root")
    (root / "train" / "dog").rename(tmp_path / "dogs")
    (root / "train" / "dog").symlink_to(tmp_path / "dogs")
    assert load(root).train.labels.tolist() == [0] * 6 + [1]
    before = folder_digest(settings(root))
    Image.new("RGB", (32, 32)).save(tmp_path / "dogs" / "c.png")
    assert load(root).train.labels.tolist() == [0] * 6 + [1, 1]
    assert folder_digest(settings(root)) != before


def test_one_class_is_enough(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part / "only").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / part / "only" / "a.png")
    assert load(tmp_path).num_classes == 1


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    path = root / "train" / "dog" / "b.png"
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    intact = path.read_bytes()
    for content in (intact[:500], b"", b"not an image"):
        path.write_bytes(content)
        assert str(path) in refused(root)


def test_an_image_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    path = root / "train" / "dog" / "b.png"
    Image.fromarray(np.full((32, 32), 40000, dtype=np.uint16)).save(path)
    message = refused(root)
    assert str(path) in message
    assert "8 bits" in message


def test_an_image_beyond_pillows_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32)
    Image.new("RGB", (64, 64)).save(root / "test" / "dog" / "b.png")
    for path in (root / "train" / "cat").iterdir():
        Image.new("RGB", (32, 32)).save(path)
    message = refused(root)
    assert str(root / "test" / "dog" / "b.png") in message
    assert "exceeds limit" in message


def test_missing_folders_are_named(tmp_path: Path) -> None:
    assert f"there is no folder {tmp_path / 'absent'};" in refused(tmp_path / "absent")
    (tmp_path / "train").mkdir()
    assert str(tmp_path / "train") in refused(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    message = refused(tmp_path)
    assert str(tmp_path / "train") in message
    assert "cat" in message
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "cat" / "a.png")
    assert str(tmp_path / "test") in refused(tmp_path)


def test_a_class_in_one_part_only_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "test" / "fox").mkdir()
    Image.new("RGB", (32, 32)).save(root / "test" / "fox" / "a.png")
    message = refused(root)
    assert "fox" in message
    assert "same classes" in message
