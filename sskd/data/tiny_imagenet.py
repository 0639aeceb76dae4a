"""TinyImageNet in its published layout (Stanford's CS231n): 200 classes of ImageNet, 64x64.

The training images are in ``train/WNID/images``. The 10,000 published validation images are the
test part: those of the test part have no published labels.
"""

from __future__ import annotations

from pathlib import Path

from sskd.data.folder import digest_of, read_listings
from sskd.data.listing import Listing, image_paths, list_classes
from sskd.data.reading import Source, abbreviate, absolute_path
from sskd.data.settings import DatasetSettings
from sskd.errors import UserError, one_line
from sskd.files import read_bounded_text

FOLDER = "tiny-imagenet-200"
ANNOTATIONS = "val/val_annotations.txt"
MOST_BYTES = 2**24  # of the annotations; the published file has 0.6 MB
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


def load_tiny_imagenet(settings: DatasetSettings) -> Source:
    """Load TinyImageNet: 100,000 training and 10,000 test images, scaled to ``settings.size``."""
    root = _root(settings)
    return read_listings(root, list_tiny_imagenet(root), settings.size)


def tiny_imagenet_digest(settings: DatasetSettings) -> str:
    """Return the SHA-256 of the paths and contents of the images that are read."""
    root = _root(settings)
    return digest_of(root, list_tiny_imagenet(root))


def refuse_missing_tiny_imagenet(settings: DatasetSettings) -> None:
    """Raise UserError if the files are not there; no image is read."""
    list_tiny_imagenet(_root(settings))


def list_tiny_imagenet(root: Path) -> tuple[Listing, Listing]:
    """Return the training and the test images; the classes are in the order of their names.

    Raises:
        UserError: a folder or the annotations are missing, or do not fit the classes.
    """
    try:
        classes = list_classes(root / "train")
        train = {name: image_paths(root, f"train/{name}/images") for name in classes}
        test = image_paths(root, "val/images")
        label_of = _annotations(root, classes)
    except (OSError, ValueError) as error:
        raise UserError(
            f"TinyImageNet is not complete in {root}: {one_line(error)}; unpack {URL} and set "
            f"dataset.root=FOLDER to the folder that holds {FOLDER}"
        ) from None
    if lacking := [path for path in test if Path(path).name not in label_of]:
        raise UserError(f"{root / ANNOTATIONS}: has no label of {abbreviate(lacking)}")
    return (
        Listing(
            classes,
            [path for paths in train.values() for path in paths],
            [label for label, paths in enumerate(train.values()) for _ in paths],
        ),
        Listing(classes, test, [label_of[Path(path).name] for path in test]),
    )


def _root(settings: DatasetSettings) -> Path:
    return absolute_path(settings.root) / FOLDER


def _annotations(root: Path, classes: list[str]) -> dict[str, int]:
    """Return the label of each validation image by its name; ValueError if a line is malformed."""
    labels = {name: label for label, name in enumerate(classes)}
    found = {}
    text = read_bounded_text(root / ANNOTATIONS, MOST_BYTES)
    for number, line in enumerate(text.splitlines(), start=1):
        name, *rest = line.split("\t")
        if not rest or rest[0] not in labels:
            raise ValueError(f"{ANNOTATIONS}, line {number}, names no class of the training images")
        found[name] = labels[rest[0]]
    return found
