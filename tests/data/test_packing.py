"""The packed file: what is in it, how it is made, and how damage is noticed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Compose, KeptRuns
from jpegs import CLASSES, load, settings, write_jpegs
from PIL import Image

import sskd.data.packed.writing
from sskd.data import SOURCES
from sskd.data.packed.jpeg import to_jpeg
from sskd.data.packed.split import PackedSplit
from sskd.errors import UserError
from sskd.measuring.store import data_key
from sskd.runs.identity import identity
from sskd.trained import TrainedNetwork

TRAIN, TEST = 1600, 400


@pytest.fixture(scope="session")
def many(kept_runs: KeptRuns, shared_folder: Path) -> Path:
    """Return a folder of 2,000 images, which no test changes."""
    kept_runs.put("jpegs", lambda root: write_jpegs(root, TRAIN, TEST))
    return shared_folder / "kept" / "jpegs"


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Return a folder of 20 images of this test."""
    return write_jpegs(tmp_path / "few", 12, 8)


def packed(split: Any) -> PackedSplit:
    assert isinstance(split, PackedSplit)
    return split


def packed_file(root: Path) -> Path:
    (path,) = (root / ".sskd-packed").glob("*.pack")
    return path


def refused(root: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(root, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the content ----


def test_two_thousand_images_are_packed_as_they_are(many: Path, tmp_path: Path) -> None:
    images = load(many, packed=str(tmp_path), name="many")
    assert (len(images.train), len(images.test), images.classes) == (TRAIN, TEST, CLASSES)
    content = (tmp_path / "many.pack").read_bytes()
    files = [path for part in ("train", "test") for path in sorted((many / part).glob("*/*"))]
    index, digest = packed(images.train).file.index, hashlib.sha256()
    assert [index.name(0), index.name(TRAIN + TEST - 1)] == [
        str(files[each].relative_to(many)) for each in (0, -1)
    ]
    for path, label, (height, width) in zip(
        files, index.labels.tolist(), index.sizes.tolist(), strict=True
    ):
        assert path.parent.name == CLASSES[label]
        with Image.open(path) as picture:
            assert picture.size == (width, height)
        source = path.read_bytes()
        position = content.find(source)
        assert position > 0
        content = content[position + len(source) :]  # they are in this order
        line = f"{path.relative_to(many)}\0{hashlib.sha256(source).hexdigest()}\n"
        digest.update(line.encode())
    assert images.digest == digest.hexdigest()


def jpeg_of(picture: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, options.pop("form", "JPEG"), **options)
    return stream.getvalue()


CHANNELS = np.broadcast_arrays(np.arange(120)[:, None], np.arange(90) * 2, 60)
GRADIENT = Image.fromarray(np.stack(CHANNELS, -1).astype(np.uint8))
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # EXIF 2.3: the right column of the picture is stored first, as its top row


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (jpeg_of(GRADIENT, form="PNG"), GRADIENT),
        (jpeg_of(GRADIENT.convert("L")), GRADIENT.convert("L").convert("RGB")),
        (jpeg_of(GRADIENT.convert("CMYK")), GRADIENT),
        (jpeg_of(GRADIENT.rotate(90, expand=True), exif=SIDEWAYS), GRADIENT),
        (jpeg_of(GRADIENT.resize((600, 900))), GRADIENT.resize((256, 384))),
    ],
    ids=["png", "grey", "cmyk", "rotated", "large"],
)
def test_other_images_become_upright_rgb_jpegs(content: bytes, expected: Image.Image) -> None:
    encoded = to_jpeg(content)
    with Image.open(io.BytesIO(encoded.content)) as found:
        assert (found.format, found.mode, found.size) == ("JPEG", "RGB", expected.size)
        assert found.size == (encoded.width, encoded.height)
        assert not found.getexif()
        difference = np.asarray(found).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() < 3


# ---- damage ----


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-1], "it is cut short"),
        (lambda content: content[: len(content) // 2], "it is cut short"),
        (lambda content: b"", "requires a buffer"),
        (lambda content: bytes(len(content)), "it is cut short"),
        (lambda content: flipped(content, -200), "the digest of its index differs"),
    ],
    ids=["by a byte", "by half", "empty", "zeros", "index"],
)
def test_a_damaged_file_is_noticed_at_the_start(
    few: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    load(few)
    path = packed_file(few)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(few)
    assert message.startswith(f"{path}: is damaged (")
    assert reason in message
    assert message.endswith("; delete the file, and the next start packs the images again")
    path.unlink()
    assert len(load(few).train) == 12


def flipped(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


def test_a_flipped_byte_of_an_image_names_it(few: Path) -> None:
    load(few)
    path = packed_file(few)
    source = (few / "train/cow/0006.jpg").read_bytes()
    content = path.read_bytes()
    path.write_bytes(flipped(content, content.find(source) + len(source) // 2))
    images = load(few, mean=[0.5] * 3, std=[0.5] * 3)
    assert images.test.images.shape[0] == 8
    with pytest.raises(UserError) as caught:
        _ = images.train.images
    expected = "the image train/cow/0006.jpg is damaged (its checksum differs); delete the file"
    assert str(caught.value).startswith(f"{path}: {expected}")


# ---- making it ----


@pytest.mark.parametrize("torn", [b"", b"\x10\x00\x00\x00torn record"])
def test_packing_resumes_where_it_was_killed(
    few: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    load(few)
    path = packed_file(few)
    expected = path.read_bytes()
    path.unlink()
    read = sskd.data.packed.writing.read_as
    seen: list[str] = []

    def stop_at_the_tenth(image: Path, convert: Any) -> Any:
        seen.append(image.name)
        if len(seen) == 10:
            raise KeyboardInterrupt
        return read(image, convert)

    monkeypatch.setattr(sskd.data.packed.writing, "available_cores", lambda: 1)
    monkeypatch.setattr(sskd.data.packed.writing, "_AHEAD", 1)
    monkeypatch.setattr(sskd.data.packed.writing, "read_as", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        load(few)
    assert not path.exists()
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(part.read_bytes() + torn)
    load(few)
    assert len(seen) == 10 + 20 - 9, "nine images were done"
    assert path.read_bytes() == expected
    assert not part.exists()


def test_a_changed_folder_is_packed_again(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(few)
    shutil.copy(few / "test/ant/0000.jpg", few / "train/bee/0001.jpg")
    second = load(few)
    assert first.digest != second.digest
    same = load(few).test.images[0]
    assert torch.equal(second.train.images[second.train.labels == 1][0], same)
    os.utime(few / "train/bee/0001.jpg", (1, 1))
    assert load(few).digest == second.digest, "the digest is of the content"
    monkeypatch.setattr(sskd.data.packed.writing, "_pack", None)
    assert load(few).digest == second.digest, "it is packed once"


def test_a_file_that_cannot_be_packed_is_one_line(few: Path, tmp_path: Path) -> None:
    image = few / "test/dog/0003.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    assert refused(few).startswith(f"{image} cannot be read as an image: ")
    image.write_bytes(content)
    (tmp_path / "file").touch()
    message = refused(few, packed=str(tmp_path / "file"))
    assert "so set dataset.packed=FOLDER to a folder" in message
    assert message.startswith(str(tmp_path / "file"))


# ---- settings ----


def test_only_the_crop_decides_the_result(composed: Compose) -> None:
    words = ("dataset=folder", "dataset.name=few")
    plain = identity(composed(*words).model_dump())
    held = ("dataset.packed=there", "dataset.workers=3", "dataset.in_memory_gib=1")
    assert identity(composed(*words, *held).model_dump()) == plain
    resized = identity(composed(*words, "dataset.crop=resized").model_dump())
    assert resized["dataset"] == plain["dataset"] | {"crop": "resized"}
    with pytest.raises(UserError, match=r"^dataset\.crop=padded: .* use dataset\.crop=resized$"):
        composed("dataset=imagenet", "dataset.crop=padded")


def test_a_run_does_not_choose_where_its_images_are_packed(few: Path, tmp_path: Path) -> None:
    chosen = settings(few, packed=str(tmp_path / "elsewhere"), in_memory_gib=2.0)
    content = yaml.safe_dump({"dataset": chosen.model_dump()})
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "best.pt").touch()
    found = TrainedNetwork(tmp_path / "best.pt").dataset
    assert found == chosen.model_copy(update={"packed": None})


def test_images_that_need_much_memory_are_refused(few: Path) -> None:
    message = refused(few, crop="padded", in_memory_gib=1e-6)
    assert message.startswith(f"{few}: its 20 images need 0.0 GiB of memory, more than dataset.in_")
    assert message.endswith("set dataset.crop=resized to pack them into a file, or dataset."
                            "in_memory_gib=1")  # fmt: skip
    assert not (few / ".sskd-packed").exists()


def test_a_packed_folder_has_the_digest_of_the_folder(few: Path) -> None:
    digest = SOURCES["folder"].digest
    padded = settings(few, crop="padded")
    assert digest(settings(few)) == digest(padded)
    images = load(few)
    keys = [data_key(each, images) for each in (padded, settings(few), settings(few, workers=1))]
    assert keys[1] == keys[2] == {**keys[0], "crop": "resized"}
    assert "crop" not in keys[0], "as in the kept measurements of earlier versions"
