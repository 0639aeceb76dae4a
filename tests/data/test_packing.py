"""The packed file: what is in it, how it is made, and how damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Compose, KeptRuns
from jpegs import CLASSES, load, settings, write_jpegs
from PIL import Image
from safetensors.torch import save

import sskd.data.digests
import sskd.data.packed.writing
from sskd.data import SOURCES
from sskd.data.packed.file import HEADER, METADATA_KEY, Index, footer_of, open_packed
from sskd.data.packed.jpeg import decode as to_tensor
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


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed file that no test changes."""
    root = write_jpegs(tmp_path_factory.mktemp("intact"), 4, 4)
    load(root, mean=[0.5] * 3, std=[0.5] * 3)
    return packed_file(root)


def with_index(path: Path, index: bytes) -> bytes:
    """Return the content of the packed file ``path`` with another index, which has its digest."""
    end = int(open_packed(path).index.starts[-1])
    return path.read_bytes()[:end] + index + footer_of(end, index)


def set_at(name: str, place: Any, value: int) -> Callable[[Index], Index]:
    """Return a function that changes a number in a tensor of an index."""

    def change(index: Index) -> Index:
        tensor = getattr(index, name).clone()
        tensor[place] = value
        return replace(index, **{name: tensor})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: replace(index, labels=index.labels.int()), "another type or shape"),
        (lambda index: replace(index, checksums=index.checksums[:, None]), "another type or shape"),
        (lambda index: replace(index, starts=index.starts.double()), "another type or shape"),
        (lambda index: replace(index, labels=index.labels[1:]), "differ in length"),
        (lambda index: replace(index, sizes=index.sizes[:, :1].clone()), "differ in length"),
        (lambda index: replace(index, names=index.names[1:-1]), "differ in length"),
        (set_at("starts", 0, 0), "between its header and its index"),
        (set_at("starts", -1, 2**40), "between its header and its index"),
        (set_at("starts", 2, 2**62), "do not increase"),
        (set_at("starts", 2, -(2**62)), "do not increase"),
        (set_at("starts", 1, HEADER.size + 9), "too short or too long"),
        (set_at("sizes", (3, 0), 0), "no pixels or too many"),
        (set_at("sizes", 3, 2**26), "no pixels or too many"),
        (set_at("sizes", 3, 2**62), "no pixels or too many"),
        (lambda index: replace(index, train=-1), "number of training images"),
        (lambda index: replace(index, train=9), "number of training images"),
        (lambda index: replace(index, train="4"), "number of training images"),
        (lambda index: replace(index, digest=None), "is not text"),
        (lambda index: replace(index, classes=(1, 2, 3, 4)), "is not text"),
        (lambda index: replace(index, classes=None), "not iterable"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    intact: Path, tmp_path: Path, change: Callable[[Index], Index], reason: str
) -> None:
    path = tmp_path / "foreign.pack"
    path.write_bytes(with_index(intact, change(open_packed(intact).index).to_bytes()))
    with pytest.raises(UserError, match=reason) as caught:
        open_packed(path)
    assert str(caught.value).startswith(f"{path}: is damaged (")


@pytest.mark.parametrize("about", ["[" * 100_000, "[]", "{}", "", "1"])
def test_an_index_of_foreign_text_is_refused(intact: Path, tmp_path: Path, about: str) -> None:
    path = tmp_path / "foreign.pack"
    path.write_bytes(with_index(intact, save({"names": torch.zeros(1)}, {METADATA_KEY: about})))
    with pytest.raises(UserError, match=r"is damaged \("):
        open_packed(path)


def test_an_image_must_be_what_the_index_says(intact: Path) -> None:
    file = open_packed(intact)
    file = replace(file, index=set_at("sizes", (3, 1), 2000)(file.index))
    assert file.image(2).dim() == 3
    with pytest.raises(UserError, match=r"0003.jpg is damaged .* the index says 2000 x"):
        file.image(3)
    height, width = GRADIENT.height, GRADIENT.width
    assert to_tensor(jpeg_of(GRADIENT), height, width).shape == (3, height, width)
    with pytest.raises(ValueError, match="pixels in L, and"):
        to_tensor(jpeg_of(GRADIENT.convert("L")), height, width)


def test_an_error_of_the_disk_is_no_damage(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    file = open_packed(intact)
    monkeypatch.setattr(os, "pread", fail)
    for attempt in (lambda: file.image(0), lambda: open_packed(intact)):
        with pytest.raises(UserError, match=r"cannot be read \(.*Stale file handle") as caught:
            attempt()
        assert "; run the command again" in str(caught.value)
        assert "delete" not in str(caught.value)


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


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the images that are read for packing."""
    plain, names = sskd.data.packed.writing.read_as, []

    def noted(path: Path, convert: Any) -> Any:
        names.append(path.name)
        return plain(path, convert)

    monkeypatch.setattr(sskd.data.packed.writing, "read_as", noted)
    return names


@pytest.mark.parametrize("is_removed", [True, False])
def test_unreadable_images_cost_no_second_pass(
    few: Path, read: list[str], capsys: pytest.CaptureFixture[str], is_removed: bool
) -> None:
    broken = [few / f"test/dog/{number:04}.jpg" for number in (3, 7)]
    for path in (*broken, *(few / f"test/cow/{number:04}.jpg" for number in (2, 6))):
        path.write_bytes(b"no image")
    (few / "test/cow/0010.jpg").write_bytes((few / "test/ant/0000.jpg").read_bytes())
    message = refused(few)
    assert message.startswith(f"{few}/test/cow/0002.jpg cannot be read as an image: ")
    assert f"; {broken[0]} cannot" in message
    assert message.endswith("; and 1 more; replace or remove 4 of 21 images, and run the command "
                            "again: it continues")  # fmt: skip
    assert len(read) == 21
    for path in (few / "test/cow/0002.jpg", few / "test/cow/0006.jpg", *broken[1:]):
        path.unlink()
    if is_removed:
        write = broken[0].with_name("0011.jpg")
        broken[0].unlink()
    else:
        write = broken[0]
    write.write_bytes((few / "test/ant/0004.jpg").read_bytes())
    read.clear()
    capsys.readouterr()
    images = load(few, mean=[0.5] * 3, std=[0.5] * 3)
    assert read == [write.name]
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert "packs 18 images of" in first
    assert second.endswith("17 images are packed already")
    assert torch.equal(images.test.images[-1], images.test.images[1])


def test_a_link_is_not_followed_to_another_file(few: Path, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", few / ".sskd-packed"
    victim.write_text("mine")
    folder.mkdir()
    for name in (".folder.pack.lock", ".folder.pack.part"):
        (folder / name).symlink_to(victim)
        message = refused(few, name="folder")
        assert message.startswith(f"{folder / name}: is a symbolic link")
        (folder / name).unlink()
    os.mkfifo(folder / ".folder.pack.part")
    assert "is not a regular file; remove it" in refused(few, name="folder")
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert refused(few).endswith("or name its place with dataset.packed=FOLDER")
    assert victim.read_text() == "mine"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_of_two_processes_one_packs(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, log = sskd.data.packed.writing.read_as, few.with_name("log")

    def noted(path: Path, convert: Any) -> Any:
        with log.open("a") as stream:
            stream.write(f"{path.name}\n")
        time.sleep(0.02)
        return plain(path, convert)

    monkeypatch.setattr(sskd.data.packed.writing, "read_as", noted)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=load, args=(few,)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert [each.exitcode for each in both] == [0, 0]
    assert len(log.read_text().splitlines()) == 20
    assert len(load(few).train) == 12


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


@pytest.mark.parametrize("ask", [SOURCES["folder"].digest, SOURCES["folder"].refuse_missing])
def test_too_many_images_are_refused_unread(
    few: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Any], Any]
) -> None:
    monkeypatch.setattr(sskd.data.digests, "open_bounded", None)
    with pytest.raises(UserError, match=r"need 0\.0 GiB of memory, more than"):
        ask(settings(few, crop="padded", in_memory_gib=1e-6))
    SOURCES["folder"].refuse_missing(settings(few, in_memory_gib=1e-6))


def test_a_packed_folder_has_the_digest_of_the_folder(few: Path) -> None:
    digest = SOURCES["folder"].digest
    padded = settings(few, crop="padded")
    assert digest(settings(few)) == digest(padded)
    images = load(few)
    keys = [data_key(each, images) for each in (padded, settings(few), settings(few, workers=1))]
    assert keys[1] == keys[2] == {**keys[0], "crop": "resized"}
    assert "crop" not in keys[0], "as in the kept measurements of earlier versions"
