"""ImageNet in its usual folders, of three classes here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import sskd.data.imagenet
from sskd.data import DatasetSettings, load_images, refuse_missing
from sskd.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
WNIDS = ("n01440764", "n01443537", "n01484850")


def settings(root: Path, **changes: Any) -> DatasetSettings:
    shown = yaml.safe_load((CONF / "imagenet.yaml").read_text())
    return DatasetSettings(**{**shown, "root": str(root), "workers": 0, **changes})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three classes in both parts, which are all that ImageNet has here."""
    monkeypatch.setattr(sskd.data.imagenet, "CLASSES", len(WNIDS))
    for part, count in (("train", 2), ("val", 1)):
        for level, wnid in enumerate(WNIDS):
            (tmp_path / part / wnid).mkdir(parents=True)
            for number in range(count):
                path = tmp_path / part / wnid / f"{wnid}_{number}.JPEG"
                Image.new("RGB", (300, 280), (80 * level, 10, 200)).save(path)
    return tmp_path


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        refuse_missing(settings(root))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_parts_are_loaded(root: Path) -> None:
    images = load_images(settings(root))
    assert images.classes == WNIDS
    assert images.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.test.labels.tolist() == [0, 1, 2]
    assert (images.image_size, images.mean) == (224, (0.485, 0.456, 0.406))
    red = images.test.images[:, 0].float().mean((1, 2))
    assert red.tolist() == pytest.approx([0, 80, 160], abs=3)
    assert (root / ".sskd-packed" / "imagenet.pack").is_file()


def test_the_published_number_of_classes_is_required(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    message = refused(root)
    assert message.startswith(
        f"{root}: has 3 classes, and ImageNet has 1,000; for other images use"
    )
    assert "dataset=folder dataset.crop=resized" in message


def test_missing_folders_say_where_to_get_the_images(root: Path) -> None:
    shutil.rmtree(root / "val")
    for place in (root, root / "nowhere"):
        message = refused(place)
        assert message.startswith(f"ImageNet is not complete in {place}: [Errno 2] No such file")
        assert "https://image-net.org" in message
        assert "set dataset.root=FOLDER" in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_must_be_in_both_parts_with_images(root: Path, part: str) -> None:
    folder = root / part / WNIDS[1]
    for path in folder.iterdir():
        path.unlink()
    assert f"{part}/{WNIDS[1]} holds no images" in refused(root)
    folder.rmdir()
    other = {"train": "val", "val": "train"}[part]
    assert refused(root) == (
        f"{root}: train and val must have the same classes, but only {other} has n01443537; add "
        "the missing class folders, or remove the extra ones"
    )


@pytest.mark.parametrize(("part", "remedy"), [("val", "valprep.sh"), ("train", "WNID.tar")])
def test_unsorted_images_say_how_to_sort_them(root: Path, part: str, remedy: str) -> None:
    for path in sorted((root / part).glob("*/*")):
        path.rename(root / part / path.name)
    message = refused(root)
    assert message.startswith(f"{root / part}: holds images outside of a class (n01440764_0.JPEG,")
    assert f"move each to {part}/WNID" in message
    assert remedy in message


def test_archives_of_classes_must_be_unpacked(root: Path) -> None:
    (root / "train" / f"{WNIDS[0]}.tar").touch()
    refuse_missing(settings(root))
    shutil.rmtree(root / "train" / WNIDS[0])
    message = refused(root)
    assert message.startswith(f"{root / 'train'}: holds archives that are not unpacked (n01440764.")
    assert message.endswith("unpack each WNID.tar into a folder WNID beside it")
