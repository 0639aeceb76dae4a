"""Listing a folder of images by class: which files are read, in which order, and which are skipped.

The folder may come from anywhere, so hidden files, links and depth are checked here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sskd.data.reading import abbreviate
from sskd.errors import UserError, shortened
from sskd.files import MOST_DEPTH, is_too_deep

PARTS = ("train", "test")
_LAYOUT = "train/CLASS and test/CLASS"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# Files and folders of operating systems, office programs, memory cards and network drives, in lower
# case.
SYSTEM_PREFIXES = (".", "~$", "@syno")
SYSTEM_NAMES = frozenset(
    {
        "thumbs.db",
        "thumbs.db:encryptable",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "icon\r",
        "__macosx",
        "__pycache__",
        "lost+found",
        "system volume information",
        "$recycle.bin",
        "recycler",
        "found.000",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "network trash folder",
        "temporary items",
        "thevolumesettingsfolder",
        "_gsdata_",
        "aquota.user",
        "aquota.group",
    }
)


@dataclass
class Skipped:
    """The paths that are not read, relative to the root, by the reason."""

    hidden: list[str] = field(default_factory=list)
    no_class: list[str] = field(default_factory=list)
    no_image: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = (
            ("hidden or system files", self.hidden),
            ("outside of a class", self.no_class),
            ("without an image extension", self.no_image),
        )
        return "; ".join(
            f"{len(paths)} {reason} ({abbreviate(sorted(paths), 3)})"
            for reason, paths in reasons
            if paths
        )


@dataclass(frozen=True)
class Listing:
    """The classes of one part, and the path of each image relative to the root with its label."""

    classes: list[str]
    paths: list[str]
    labels: list[int]


def list_folder(root: Path) -> tuple[Listing, Listing, Skipped]:
    """Return the images in ``root/train`` and ``root/test``, and the paths that are skipped.

    Raises:
        UserError: a folder is missing or cannot be read, a class is empty, or the classes differ.
    """
    skipped = Skipped()
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root}: is a file; set dataset.root=FOLDER, which holds {_LAYOUT}")
        _require_folder(root)
        train, test = (_list_part(root, part, skipped) for part in PARTS)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from error
    refuse_differing(root, {"train": train.classes, "test": test.classes})
    return train, test, skipped


def refuse_differing(root: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError if two parts have other classes; ``parts`` are these by name."""
    shared = set.intersection(*map(set, parts.values()))
    alone = [
        f"only {part} has {abbreviate(sorted(own))}"
        for part, classes in parts.items()
        if (own := set(classes) - shared)
    ]
    if alone:
        raise UserError(
            f"{root}: {' and '.join(parts)} must have the same classes, but {' and '.join(alone)}; "
            "add the missing class folders, or remove the extra ones"
        )


def list_classes(folder: Path) -> list[str]:
    """Return the names of the classes in ``folder``; OSError if it cannot be read."""
    return sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not is_hidden(each.name)
    )


def image_paths(root: Path, inside: str) -> list[str]:
    """Return the paths of the images in the folder ``inside`` of ``root``, relative to ``root``.

    Raises:
        OSError: the folder cannot be read.
        ValueError: it holds no images.
    """
    names = sorted(os.listdir(root / inside))  # noqa: PTH208  a Path for each takes much longer
    found = [f"{inside}/{name}" for name in names if is_image(name) and not is_hidden(name)]
    if not found:
        raise ValueError(f"{inside} holds no images")
    return found


def _list_part(root: Path, part: str, skipped: Skipped) -> Listing:
    """List the images in the order of torchvision's ImageFolder, which runs on disk depend on."""
    _require_folder(root / part)
    members: dict[str, list[tuple[str, list[str]]]] = {}
    for folder, subfolders, files in walk(root / part):
        inside = os.path.relpath(folder, root)
        skipped.hidden += [f"{inside}/{name}" for name in subfolders + files if is_hidden(name)]
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]  # prunes the walk
        if inside == part:
            members = {name: [] for name in sorted(subfolders)}
        shown = sorted(name for name in files if not is_hidden(name))
        images = [name for name in shown if is_image(name)]
        skipped.no_image += [f"{inside}/{name}" for name in shown if not is_image(name)]
        if inside == part:
            skipped.no_class += [f"{inside}/{name}" for name in images]
        else:
            members[Path(inside).parts[1]].append((inside, images))
    found = {
        label: [f"{inside}/{name}" for inside, images in sorted(folders) for name in images]
        for label, folders in members.items()
    }
    _refuse_empty(root / part, found)
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    return Listing(list(found), [path for paths in found.values() for path in paths], labels)


def _require_folder(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"there is no folder {path}; set dataset.root=FOLDER to one that holds {_LAYOUT}"
        )


def _refuse_empty(part: Path, found: dict[str, list[str]]) -> None:
    if not found:
        raise UserError(f"{part}: holds no class; put images into {part}/CLASS")
    if empty := [label for label, paths in found.items() if not paths]:
        raise UserError(
            f"{part}: has no images of {abbreviate(empty)}; put some into the folder or remove it "
            f"(the names of images end in {', '.join(EXTENSIONS)})"
        )


def is_hidden(name: str) -> bool:
    return name.lower().startswith(SYSTEM_PREFIXES) or name.lower() in SYSTEM_NAMES


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def walk(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like ``os.walk``, and follow links.

    Raises:
        OSError: a folder cannot be read; ``os.walk`` would skip it.
        UserError: a folder is too deep, or is reached by two paths. Its images would then count
            twice, and a few links to a parent folder would make the walk endless.
    """
    seen: dict[tuple[int, int], str] = {}
    for step in os.walk(top, onerror=_raise, followlinks=True):
        if is_too_deep(step[0], top):
            raise UserError(
                f"{shortened(step[0], 120)}: is more than {MOST_DEPTH} folders below "
                f"{shortened(str(top), 120)}; move or remove it"
            )
        status = Path(step[0]).stat()
        first = seen.setdefault((status.st_dev, status.st_ino), step[0])
        if first != step[0] and status.st_ino:  # some file systems have no inode numbers
            raise UserError(f"{step[0]}: is the same folder as {first}; remove the link")
        yield step


def _raise(error: OSError) -> None:
    raise error
