"""ImageNet in its usual folders: ILSVRC2012, 1,281,167 training images of 1,000 classes.

Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015. The 50,000
validation images are the test part: those of the test part have no published labels.
"""

from __future__ import annotations

from pathlib import Path

from sskd.data.listing import (
    Listing,
    image_paths,
    is_hidden,
    is_image,
    list_classes,
    refuse_differing,
)
from sskd.data.packed.source import load_packed, packed_digest
from sskd.data.reading import Source, abbreviate, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError, one_line

CLASSES = 1000
LAYOUT = "train/WNID/*.JPEG and val/WNID/*.JPEG"
URL = "https://image-net.org/download.php"
SORTING = "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"


def load_imagenet(settings: DatasetSettings) -> Source:
    """Load ImageNet from its packed file, which is made of the folder if it is missing."""
    return load_packed(settings, list_imagenet(absolute_path(settings.root)))


def imagenet_digest(settings: DatasetSettings) -> str:
    """Return the SHA-256 of the paths and contents of the images, which are packed first."""
    return packed_digest(settings, list_imagenet(absolute_path(settings.root)))


def refuse_missing_imagenet(settings: DatasetSettings) -> None:
    """Raise UserError if the folder does not hold ImageNet; no image is read."""
    list_imagenet(absolute_path(settings.root))


def list_imagenet(root: Path) -> tuple[Listing, Listing]:
    """Return the training and the validation images; the classes are in the order of their names.

    Raises:
        UserError: a folder or a class is missing, or there are not 1,000 classes.
    """
    try:
        _refuse_unsorted(
            root / "train", "for example by unpacking each WNID.tar into a folder of its own"
        )
        _refuse_archives(root / "train")
        _refuse_unsorted(
            root / "val", f"for example by running the script {SORTING} in that folder"
        )
        train = list_classes(root / "train")
        val = list_classes(root / "val")
        refuse_differing(root, {"train": train, "val": val})
        if len(train) != CLASSES:
            raise UserError(
                f"{root}: has {len(train):,} classes, and ImageNet has {CLASSES:,}; for other "
                "images use dataset=folder dataset.crop=resized, with train/CLASS and test/CLASS"
            )
        return _list_part(root, "train", train), _list_part(root, "val", val)
    except (OSError, ValueError) as error:
        raise UserError(
            f"ImageNet is not complete in {root}: {one_line(error)}; get the images of ILSVRC2012 "
            f"at {URL} (with an account), and set dataset.root=FOLDER to the folder that holds "
            f"{LAYOUT}"
        ) from None


def _list_part(root: Path, part: str, classes: list[str]) -> Listing:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = image_paths(root, f"{part}/{name}")
        paths += found
        labels += [label] * len(found)
    return Listing(classes, paths, labels)


def _refuse_unsorted(folder: Path, remedy: str) -> None:
    """Raise UserError if the images of ``folder`` are not in folders of their classes."""
    shown = [each.name for each in folder.iterdir() if not is_hidden(each.name)]
    if unsorted := sorted(name for name in shown if is_image(name)):
        raise UserError(
            f"{folder}: holds images outside of a class ({abbreviate(unsorted, 2)}); move each to "
            f"{folder.name}/WNID, {remedy}"
        )


def _refuse_archives(folder: Path) -> None:
    """Raise UserError if classes are still in the archives in which ImageNet is published."""
    archives = sorted(folder.glob("n*.tar"))
    if packed := [path.name for path in archives if not path.with_suffix("").is_dir()]:
        raise UserError(
            f"{folder}: holds archives that are not unpacked ({abbreviate(packed, 2)}); unpack "
            "each WNID.tar into a folder WNID beside it"
        )
