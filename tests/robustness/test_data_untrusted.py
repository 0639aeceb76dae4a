"""Folders of images with other files, with missing parts, and with unusual names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command, Compose
from PIL import Image
from test_data_cifar import small_cifar  # noqa: F401
from test_data_folder import load, make_folder, refused, settings
from torchvision.datasets import ImageFolder

from sskd.data.folder import folder_digest, names_and_sizes
from sskd.errors import UserError
from sskd.train import train

# ---- skipped files ----

HIDDEN = [
    "train/cat/.DS_Store",
    "train/cat/._b.png",
    "train/.hidden.png",
    "train/.ipynb_checkpoints/b.png",
    "train/cat/.ipynb_checkpoints/b-checkpoint.png",
    "test/.Trash-1000/files/b.png",
    "train/cat/.directory",
    "train/cat/.git/b.png",
    "train/cat/Thumbs.db",
    "train/cat/THUMBS.DB",
    "train/cat/desktop.ini",
    "train/cat/Icon\r",
    "train/__MACOSX/cat/b.png",
    "train/cat/__pycache__/b.png",
    "train/@eaDir/b.png/SYNOFILE_THUMB_S.png",
    "train/cat/@eaDir/b.png",
    "test/cat/#recycle/b.png",
    "train/$RECYCLE.BIN/b.png",
    "test/System Volume Information/b.png",
    "test/lost+found/b.png",
    "train/~snapshot/b.png",
    "test/RECYCLER/b.png",
    "train/TheVolumeSettingsFolder/b.png",
    "train/_gsdata_/b.png",
    "test/cat/@SynoResource/b.png",
    "train/@SynoFinderMeta/b.png",
    "train/aquota.user/b.png",
    "test/cat/aquota.group",
    "train/cat/~$b.png",
    "train/~$cat/b.png",
]
NO_IMAGE = [
    "train/README",
    "train/cat/README.md",
    "test/labels.csv",
    "test/cat/b.png.txt",
    "train/cat/b.xml",
    "train/cat/b.gif",
    "train/cat/b.png~",
    "train/cat/more/notes.txt",
]
NO_CLASS = ["train/a.png", "test/b.JPG"]


def add(path: Path) -> None:
    """Write an image to ``path``, under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(path, "png")


@pytest.mark.parametrize("name", [*HIDDEN, *NO_IMAGE, *NO_CLASS])
def test_other_files_are_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root = make_folder(tmp_path)
    before, digest = load(root), folder_digest(settings(root))
    assert capsys.readouterr().err == ""
    add(root / name)
    images = load(root)
    assert folder_digest(settings(root)) == digest
    assert images.classes == before.classes
    for split, other in ((images.train, before.train), (images.test, before.test)):
        assert torch.equal(split.images, other.images)
        assert torch.equal(split.labels, other.labels)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "skipped 1 " in err
    parts = name.replace("\r", "?").split("/")
    assert any("/".join(parts[: k + 1]) + ")" in err for k in range(len(parts)))


def test_skipped_files_are_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path)
    for name in [*HIDDEN, *NO_IMAGE, *NO_CLASS, "train/cat/\x1b[31m.txt"]:
        add(root / name)
    for _ in range(3):  # as the jobs of a sweep do
        load(root)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 500
    for part in (
        f"{len(HIDDEN)} hidden",
        "2 outside of a class (test/b.JPG, train/a.png)",
        "9 without",
    ):
        assert part in err
    assert "\x1b" not in err


def test_the_root_may_be_in_a_hidden_folder(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "@eaDir" / ".cache" / "photos")
    assert len(load(root).train) == 7
    assert folder_digest(settings(root))


def test_images_have_the_order_of_torchvision(tmp_path: Path) -> None:
    """Earlier versions used torchvision, and their runs must resume with the same order."""
    names = ["b/z.png", "b/y/1.PNG", "b/y-1.png", "b/y/x/2.jpeg", "b/y.png", "a/é.png", "B/9.tiff"]
    for part in ("train", "test"):
        for shade, name in enumerate(names):
            path = tmp_path / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (shade, 0, 0)).save(path, "png")
    reference, images = ImageFolder(tmp_path / "train"), load(tmp_path)
    assert list(images.classes) == reference.classes
    assert images.train.labels.tolist() == reference.targets
    shades = [np.asarray(Image.open(path))[0, 0, 0] for path, _ in reference.samples]
    assert images.train.images[:, 0, 0, 0].tolist() == shades


@pytest.mark.parametrize("levels", [65, 400])
def test_a_folder_that_is_too_deep_is_refused(tmp_path: Path, levels: int) -> None:
    root = make_folder(tmp_path)
    (root / "train/cat").joinpath(*["d"] * levels).mkdir(parents=True)
    message = refused(root)
    assert f"{root}/train/cat/d/"[:50] in message
    assert "is more than 64 folders below" in message
    assert len(message) < 400


def test_a_hidden_folder_may_have_any_depth(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "train/.git").joinpath(*["d"] * 100).mkdir(parents=True)
    assert len(load(root).train) == 7
    assert names_and_sizes(settings(root)) is None


# ---- missing data ----


def move_away(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))


def put_a_file(root: Path) -> None:
    move_away(root)
    root.write_text("")


def without(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).rename(root.parent / "elsewhere")


def empty_class(root: Path) -> None:
    for part in ("train", "test"):
        (root / part / "owl").mkdir()


def class_of_text_files(root: Path) -> None:
    for path in (root / "test/dog").iterdir():
        path.rename(path.with_suffix(".txt"))


MISSING: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder": (move_away, "there is no folder {root};"),
    "a file": (put_a_file, "{root}: is a file;"),
    "train": (without("train"), "there is no folder {root}/train;"),
    "test": (without("test"), "there is no folder {root}/test;"),
    "an empty class": (empty_class, "{root}/train: has no images of owl;"),
    "a class of text files": (class_of_text_files, "{root}/test: has no images of dog;"),
    "a class in one part": (without("test/dog"), "{root}: train and test must have the same"),
}


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("method", ["kd", "vanilla"])
def test_missing_data_are_reported_before_a_teacher(
    composed: Compose, tmp_path: Path, kind: str, method: str
) -> None:
    change, message = MISSING[kind]
    root = make_folder(tmp_path / "photos")
    change(root)
    words = ("arch@student=resnet8", "arch@teacher=resnet8", "schedule.epochs=1")
    config = composed(*words, "dataset=folder", f"dataset.root={root}", f"method={method}")
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value).startswith(message.format(root=root))
    assert "teacher" not in str(caught.value)
    assert not Path(config.runs).exists()


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_missing_cifar_is_reported_before_a_teacher(
    composed: Compose, tmp_path: Path, dataset: str
) -> None:
    words = (f"dataset={dataset}", f"dataset.root={tmp_path / 'absent'}", "method=kd")
    with pytest.raises(UserError, match=r"CIFAR100? is not in .*absent"):
        train(composed(*words, "dataset.download=false"))
    with pytest.raises(UserError, match="no finished run of the teacher"):
        train(composed(*words, "dataset.download=true"))


def test_a_missing_teacher_is_reported_if_data_exist(
    composed: Compose,
    small_cifar: Path,  # noqa: F811
) -> None:
    words = (f"dataset.root={small_cifar}", "dataset.download=false", "method=kd")
    with pytest.raises(UserError, match="no finished run of the teacher"):
        train(composed(*words))


# ---- names that are not UTF-8 ----


@pytest.mark.parametrize("name", ["caf\udce9", "\udcff", "日本\udc93"])
def test_a_class_name_may_be_invalid_utf8(composed: Compose, tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path / "photos")
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / name)
        (root / part / name / "b.png").rename(root / part / name / f"b{name}.png")
    classes = load(root).classes
    assert len(classes) == 2
    escaped = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    assert sorted(classes) == sorted([escaped, "dog"])
    "".join(classes).encode()  # it can be encoded
    words = ("dataset=folder", f"dataset.root={root}", "schedule.epochs=1", "method=vanilla")
    assert train(composed(*words, "arch@student=resnet8")).top1


@pytest.mark.parametrize("kind", ["a broken image", "an empty class"])
def test_an_error_with_such_a_name_can_be_printed(tmp_path: Path, kind: str) -> None:
    root = make_folder(tmp_path)
    if kind == "a broken image":
        (root / "train/dog/b\udce9.png").write_bytes(b"")
    else:
        (root / "train/caf\udce9").mkdir()
    refused(root).encode()


@pytest.mark.parametrize("name", [None, "photos"])
def test_a_root_that_is_not_utf8_is_refused(
    command: Command, tmp_path: Path, name: str | None
) -> None:
    root = make_folder(tmp_path / "caf\udce9")
    words = ["dataset=folder", f"dataset.root='{root}'", "method=vanilla"]
    status, out, err = command(*words, *([f"dataset.name={name}"] if name else []))
    assert (status, out, err.count("\n")) == (1, "", 1), err
    assert "dataset.root: is not valid UTF-8, which a run's files need; rename" in err
    link = tmp_path / "link"
    link.symlink_to(root)
    assert len(load(link).train) == 7, "the advice in the error works"
